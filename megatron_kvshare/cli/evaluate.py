"""``kvshare evaluate``: perplexity, the gap to exact evaluation, and lm-eval tasks."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_kvshare.cli.progress import ProgressLine
from megatron_kvshare.config.fields.types import SCHEMA, Count, Index, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.ownership.owner import file_place, owned

_EXAMPLES = """\
  kvshare evaluate --load runs/my/checkpoint --data-path runs/my_text_document --split 90,10,0
  kvshare evaluate --hf runs/my/hf --text held_out.txt --output runs/my/scores
  kvshare evaluate --hf runs/my/hf --tasks hellaswag piqa --task-path runs/lm-eval-tasks

Losses are nats per token. For maps with upward layers the first --gap-tokens are also evaluated
exactly, as decoding computes them: gap = exact - by sweeps. lm-eval tasks need the extra `eval`;
tools/lm_eval_tasks.py makes the paper's eight from a package, without a network."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class EvaluateConfig:
    """A model, and what to score it on."""

    load: str | None = None
    """The --save folder of a run, or one of its iter_* folders."""
    hf: str | None = None
    """Hugging Face folder, instead of --load."""
    data_path: str | None = None
    """Prefix of .bin/.idx files."""
    split: str | None = None
    """Evaluate on the validation documents of this split of --data-path; left out: on all."""
    text: tuple[str, ...] = ()
    """Files of text (.jsonl or plain, also .xz, .gz or .bz2), instead of --data-path."""
    json_key: str = "text"
    """Key of the text in .jsonl."""
    tokenizer_model: str | None = None
    """Tokenizer for --text; left out: the model's own."""
    split_special_tokens: bool = False
    """Encode the names of special tokens inside --text as text, as in `kvshare preprocess`."""
    seq_length: Count | None = None
    """Tokens per window; left out: as many as the model is declared for."""
    batch_size: Count = 4
    """Windows at a time."""
    max_tokens: Count = 200_000
    """Score at most this many tokens."""
    gap_tokens: Index = 20_000
    """Also score about this many tokens exactly; 0: none."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks, by name."""
    task_path: str | None = None
    """Folder with task files, as tools/lm_eval_tasks.py writes them; lm-eval runs what they say."""
    limit: Count | None = None
    """Documents per task; left out: all."""
    trust_remote_code: bool = False
    """Run code that the folder of --hf or --tokenizer-model brings along; never done otherwise."""
    output: str | None = None
    """Folder for results.json and results.csv."""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command = Command("kvshare evaluate", "Score a model on held-out text and on tasks.", _EXAMPLES)
    config = parse(EvaluateConfig, argv, command)
    _check(config)
    rows: list[dict[str, Any]] = []
    if config.data_path is not None or config.text:
        rows += _scores(config)
    if config.tasks:
        rows += _tasks(config)
    _show(rows)
    if config.output is not None:
        _write(Path(config.output), config, rows)
    return 0


def _check(config: EvaluateConfig) -> None:
    faults = []
    if (config.load is None) == (config.hf is None):
        rule = "one model is evaluated"
        faults.append(Fault("--load, --hf", config.load, rule, "give either --load or --hf"))
    sources = (config.data_path is not None) + bool(config.text)
    if sources > 1 or (not sources and not config.tasks):
        fix = "give one of --data-path and --text, or --tasks"
        rule = "there must be one text to score, or tasks"
        faults.append(Fault("--data-path, --text", config.data_path, rule, fix))
    if faults:
        raise ConfigError(faults)


def _scores(config: EvaluateConfig) -> list[dict[str, Any]]:
    from megatron_kvshare.evaluation.api import load_model
    from megatron_kvshare.evaluation.evaluate import score, tokens_of_files, tokens_of_text

    model = load_model(config.load or config.hf or "")
    if config.data_path is not None:
        ids, name = tokens_of_files(config.data_path, config.split, model), config.data_path
    else:
        ids = tokens_of_text(config.text, _tokenizer(config), config.json_key)
        name = " ".join(config.text)
    ids = ids[: config.max_tokens + 1]
    line = ProgressLine()
    scores = score(
        model,
        ids,
        config.seq_length or model.spec.model.max_positions,
        config.batch_size,
        config.gap_tokens,
        lambda scored, of: line.show(scored / of, f"{scored:,} of {of:,} tokens"),
    )
    return [
        {"on": name, "metric": metric, "value": value} for metric, value in scores.rows().items()
    ]


def _tokenizer(config: EvaluateConfig):
    from megatron_kvshare.checkpoint.reader import open_checkpoint
    from megatron_kvshare.data.tokenizers import kind_of, load_tokenizer

    path = config.tokenizer_model or config.hf
    if path is not None:
        kind = kind_of(path)
    else:
        settings = open_checkpoint(Path(config.load or "")).manifest.config
        kind, path = settings["tokenizer_type"], settings["tokenizer_model"]
    return load_tokenizer(
        kind,
        path,
        split_special_tokens=config.split_special_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def _tasks(config: EvaluateConfig) -> list[dict[str, Any]]:
    from megatron_kvshare.evaluation.lm_eval import TasksJob, run_tasks

    job = TasksJob(
        folder=Path(config.hf or ""),
        tasks=config.tasks,
        task_path=config.task_path,
        limit=config.limit,
        trust_remote_code=config.trust_remote_code,
    )
    if config.hf is not None:
        return run_tasks(job)
    from megatron_kvshare.checkpoint.reader import open_checkpoint
    from megatron_kvshare.conversion.export import ExportJob, export
    from megatron_kvshare.megatron_api import parallel

    stored = open_checkpoint(Path(config.load or ""))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        trust = config.trust_remote_code
        with parallel.alone() as state:
            proven = export(stored, ExportJob(save=folder, trust_remote_code=trust), state)
        print(f"proven: {proven}", file=sys.stderr)
        return run_tasks(replace(job, folder=folder))


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("on", overflow="fold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for row in rows:
        value = row["value"]
        table.add_row(
            row["on"], row["metric"], f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        )
    Console().print(table)


def _write(folder: Path, config: EvaluateConfig, rows: list[dict[str, Any]]) -> None:
    try:
        with owned(file_place("--output", str(folder / "results"))):
            content = {"model": config.load or config.hf, "results": rows}
            (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
            with (folder / "results.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["on", "metric", "value"])
                writer.writeheader()
                writer.writerows(rows)
    except OSError as error:
        fix = "give a folder that can be written"
        raise ConfigError(
            Fault("--output", str(folder), f"cannot be written ({error})", fix)
        ) from error
    print(f"wrote {folder}/results.json and results.csv")
