"""Where metrics go (L5): console, JSON lines, TensorBoard, wandb; all get the same records."""

from __future__ import annotations

import json
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from megatron_kvshare.config import LogConfig, PretrainConfig
from megatron_kvshare.config.describe import as_dict
from megatron_kvshare.errors import ConfigError, Fault

Record = dict[str, Any]
"""Metrics of one step by name; ``step`` counts from 1."""


class Sink(Protocol):
    """A destination of records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def open_sinks(config: PretrainConfig, step: int, tracking: dict[str, str]) -> list[Sink]:
    """The sinks that the settings ask for, going on after ``step``; on one process of the job only.

    ``tracking``: what an earlier part of the run noted; gets what this part notes.

    Raises:
        ConfigError: a file cannot be written, or a package is missing or refuses to start.
    """
    log = config.log
    sinks: list[Sink] = [Console(config.train.train_iters)]
    if log.metrics_file is not None:
        sinks.append(JsonLines(Path(log.metrics_file), step))
    if log.tensorboard_dir is not None:
        sinks.append(TensorBoard(log.tensorboard_dir, step))
    if log.wandb_project is not None:
        sinks.append(Wandb(log, as_dict(config), tracking))
    return sinks


class Console:
    """One line per record."""

    def __init__(self, train_iters: int) -> None:
        self._total = train_iters

    def write(self, record: Record) -> None:
        text = self._valid(record) if "valid_loss" in record else self._train(record)
        print(text, flush=True)

    def close(self) -> None:
        """Nothing to close."""

    def _at(self, record: Record) -> str:
        return f"step {record['step']:>{len(str(self._total))}}/{self._total}"

    def _valid(self, record: Record) -> str:
        loss, perplexity = record["valid_loss"], record["valid_perplexity"]
        text = f"{self._at(record)} | validation loss {loss:.4f} | perplexity {perplexity:.2f}"
        gap = record.get("valid_kv_gap")
        return text if gap is None else f"{text} | exact {gap:+.4f}"

    def _train(self, record: Record) -> str:
        parts = [
            f"{self._at(record)} ({record['step'] / self._total:.0%})",
            f"ETA {timedelta(seconds=round(record['eta_seconds']))}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.3g}",
            f"grad norm {record['grad_norm']:.3f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['tflops']:.3g} TFLOP/s",
            f"MFU {record['mfu']:.1%}",
        ]
        if "kv_residual" in record:
            parts.append(f"KV residual {record['kv_residual']:.2g}")
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} steps skipped")
        return " | ".join(parts)


class JsonLines:
    """One JSON object per line, each step once: a resumed run goes on in the same file.

    Lines of steps that are now done again (a run that died had gone on after its last checkpoint)
    move to the file ``NAME.replaced`` beside it. What is not a finite number is written as null.
    """

    def __init__(self, path: Path, step: int) -> None:
        """``step``: the last one that stays."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _set_aside(path, step)
            path.touch()
        except OSError as error:
            fix = "give a file in a folder you can write to"
            rule = f"it cannot be written: {error.strerror}"
            raise ConfigError(Fault("--metrics-file", str(path), rule, fix)) from error

    def write(self, record: Record) -> None:
        values = {name: value if _is_plain(value) else None for name, value in record.items()}
        append_line(self._path, values)

    def close(self) -> None:
        """Nothing to close: every line is written at once."""


def append_line(path: Path, values: Record) -> None:
    """Add ``values`` as a line of JSON; a full disk costs the line and a warning, not the run."""
    try:
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps(values) + "\n").encode())
    except OSError as error:
        text = f"warning: {path} cannot be written: {error.strerror}"
        print(text, file=sys.stderr, flush=True)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _set_aside(path: Path, step: int) -> None:
    """Leave the lines up to ``step`` in ``path`` and append the others to ``path.replaced``."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    stay = [line for line, at in zip(lines, steps, strict=True) if at <= step]
    if len(stay) == len(lines):
        return
    with path.with_name(path.name + ".replaced").open("a", encoding="utf-8") as file:
        file.writelines(line for line, at in zip(lines, steps, strict=True) if at > step)
    draft = path.with_name(path.name + ".partial")
    draft.write_text("".join(stay), encoding="utf-8")
    draft.replace(path)


def _step_of(line: str) -> float:
    """Infinite for what is no record: a line cut off when the process was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Event files; a record's fields become ``train/...`` or ``valid/...``."""

    def __init__(self, folder: str, step: int) -> None:
        """``step``: the last one that stays; later events of an earlier part are purged."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("--tensorboard-dir", folder, "tensorboard") from error
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        for name, value in _tagged(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A wandb run; with ``--wandb-mode offline`` nothing leaves the machine.

    Its id goes to ``tracking`` and with it into checkpoints, so that a resumed run is the same one.
    """

    def __init__(self, log: LogConfig, config: Record, tracking: dict[str, str]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("--wandb-project", log.wandb_project, "wandb") from error
        try:
            self._run = wandb.init(
                project=log.wandb_project,
                name=log.wandb_exp_name,
                dir=log.wandb_save_dir,
                mode=log.wandb_mode,
                config=config,
                id=tracking.get("wandb"),
                resume="allow",
            )
        except wandb.errors.Error as error:
            fix = "run `wandb login`, or add --wandb-mode offline"
            raise ConfigError(
                Fault("--wandb-project", log.wandb_project, f"wandb does not start: {error}", fix)
            ) from error
        tracking["wandb"] = self._run.id

    def write(self, record: Record) -> None:
        self._run.log(_tagged(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _tagged(record: Record) -> dict[str, float]:
    part = "valid" if "valid_loss" in record else "train"
    return {
        f"{part}/{name.removeprefix('valid_')}": float(value)
        for name, value in record.items()
        if name != "step"
    }


def _missing(flag: str, value: object, package: str) -> ConfigError:
    fix = f"pip install {package}, or drop {flag}"
    return ConfigError(Fault(flag, value, f"the package {package} is not installed", fix))
