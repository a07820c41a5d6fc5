"""Downstream tasks by EleutherAI's lm-evaluation-harness, on a Hugging Face folder (L6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kvshare.errors import ConfigError, Fault


def run_tasks(
    folder: Path, tasks: Sequence[str], task_path: str | None, limit: int | None
) -> list[dict[str, Any]]:
    """Rows ``on, metric, value`` of every task, with standard errors.

    The folder's own code is run, so it should be an export of yours. Nothing is fetched.

    Raises:
        ConfigError: lm-eval is not installed, or knows no such task.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        rule = "lm-eval is not installed"
        fix = "pip install 'megatron-kvshare[eval]'"
        raise ConfigError(Fault("--tasks", " ".join(tasks), rule, fix)) from error
    manager = TaskManager(include_path=task_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        rule = "lm-eval knows no such task"
        fix = "make them with tools/lm_eval_tasks.py and give its folder as --task-path"
        raise ConfigError(Fault("--tasks", " ".join(unknown), rule, fix))
    model = {
        "pretrained": str(folder),
        "trust_remote_code": True,
        "dtype": "float32",
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        device="cpu" if not _has_gpu() else "cuda",
        bootstrap_iters=0,
    )
    return [
        {"on": task, "metric": name.removesuffix(",none"), "value": value}
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float)
    ]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
