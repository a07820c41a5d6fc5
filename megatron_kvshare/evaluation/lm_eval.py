"""Downstream tasks by EleutherAI's lm-evaluation-harness, on a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kvshare.conversion.config_keys import MODEL_TYPE
from megatron_kvshare.conversion.folder import CONFIG, read_json
from megatron_kvshare.conversion.importing import open_folder
from megatron_kvshare.conversion.own_code import foreign_code, refuse_foreign_code
from megatron_kvshare.errors import ConfigError, Fault

_FIX = "read that code, then give --trust-remote-code to run it"


@dataclass(frozen=True, kw_only=True)
class TasksJob:
    """``task_path``: a folder of task files, which are code: lm-eval runs what they say.
    ``trust_remote_code``: run code of the model's folder too."""

    folder: Path
    tasks: Sequence[str]
    task_path: str | None = None
    limit: int | None = None
    trust_remote_code: bool = False


def run_tasks(job: TasksJob) -> list[dict[str, Any]]:
    """Rows ``on, metric, value`` of every task, with standard errors.

    Exports are run by the modelling file of this package, whichever version wrote them. Nothing is
    fetched.

    Raises:
        ConfigError: lm-eval is not installed or knows no such task, or the folder has other code.
    """
    if not job.trust_remote_code:
        refuse_foreign_code(job.folder, _FIX)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        rule = "lm-eval is not installed"
        fix = "pip install 'megatron-kvshare[eval]'"
        raise ConfigError(Fault("--tasks", " ".join(job.tasks), rule, fix)) from error
    manager = TaskManager(include_path=job.task_path)
    unknown = [task for task in job.tasks if task not in manager.all_tasks]
    if unknown:
        rule = "lm-eval knows no such task"
        fix = "make them with tools/lm_eval_tasks.py and give its folder as --task-path"
        raise ConfigError(Fault("--tasks", " ".join(unknown), rule, fix))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=_model(job),
        tasks=list(job.tasks),
        task_manager=manager,
        limit=job.limit,
        device=_device(),
        bootstrap_iters=0,
    )
    return [
        {"on": task, "metric": name.removesuffix(",none"), "value": value}
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float)
    ]


def _model(job: TasksJob) -> dict[str, Any]:
    """What lm-eval's own model takes: the folder, or for an export the model and its tokenizer."""
    is_export = read_json(job.folder / CONFIG).get("model_type") == MODEL_TYPE
    foreign = job.trust_remote_code and bool(foreign_code(job.folder))
    if foreign or not is_export:
        trust = job.trust_remote_code
        return {"pretrained": str(job.folder), "trust_remote_code": trust, "dtype": "float32"}
    if "tokenizer.json" in open_folder(job.folder).missing:
        rule, fix = "lm-eval needs its tokenizer", "export it again, with a tokenizer"
        raise ConfigError(Fault(str(job.folder / "tokenizer.json"), "missing", rule, fix))
    import torch
    from transformers import AutoTokenizer

    from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM

    model = KVShareForCausalLM.from_pretrained(
        job.folder, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(
        job.folder, trust_remote_code=False, local_files_only=True
    )
    return {"pretrained": model.to(_device()), "tokenizer": tokenizer}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
