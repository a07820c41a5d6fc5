"""Where metrics go: console, JSON lines, TensorBoard, wandb; all get the same records.

None of them may cost a step or a checkpoint: what fails is told once and left out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_kvshare.config import LogConfig, PretrainConfig
from megatron_kvshare.config.flags.describe import as_dict
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.output import PASSING, complain
from megatron_kvshare.ownership.aside import aside, remove_leftovers
from megatron_kvshare.train.console import Console
from megatron_kvshare.train.owning import Owner

Record = dict[str, Any]
"""Metrics of one step by name; ``step`` counts from 1."""


class Sink(Protocol):
    """A destination of records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    config: PretrainConfig, step: int, tracking: dict[str, str], owner: Owner
) -> list[Sink]:
    """The sinks that the settings ask for, going on after ``step``; on one process of the job only.

    ``tracking``: what an earlier part of the run noted; gets what this part notes. ``owner``: is
    asked before every line whether the metrics file still belongs to this run.

    Raises:
        ConfigError: a file may not be written, or a package is missing or refuses its settings.
    """
    log = config.log
    sinks: list[Sink] = [Console(config.train.train_iters)]
    if log.metrics_file is not None and owner.has_metrics_file:
        file = partial(JsonLines, Path(log.metrics_file), step, owner.holds)
        sinks.append(Expendable("--metrics-file", file))
    if (folder := log.tensorboard_dir) is not None:
        sinks.append(Expendable("--tensorboard-dir", partial(TensorBoard, folder, step)))
    if log.wandb_project is not None:
        sinks.append(Expendable("--wandb-project", partial(Wandb, log, as_dict(config), tracking)))
    return sinks


class Expendable:
    """A sink that is told of once and left out from then on when it fails, in whatever way."""

    def __init__(self, flag: str, make: Callable[[], Sink]) -> None:
        """Raises :class:`ConfigError` as ``make`` does: that is for the user to put right."""
        self._flag = flag
        self._sink: Sink | None = None
        with self._left_out():
            self._sink = make()

    def write(self, record: Record) -> None:
        with self._left_out():
            if self._sink is not None:
                self._sink.write(record)

    def close(self) -> None:
        with self._left_out():
            if self._sink is not None:
                self._sink.close()

    @contextlib.contextmanager
    def _left_out(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            sink, self._sink = self._sink, None
            complain(f"warning: {self._flag} fails and is left out from here on: {error}")
            with contextlib.suppress(Exception):  # it has failed already
                if sink is not None:
                    sink.close()


class JsonLines:
    """One JSON object per line, each step once: a resumed run goes on in the same file.

    Lines of steps that are now done again (a run that died had gone on after its last checkpoint)
    move to the file ``NAME.replaced`` beside it. What is not a finite number is written as null.
    """

    def __init__(self, path: Path, step: int, is_ours: Callable[[], bool] = lambda: True) -> None:
        """``step``: the last one that stays; ``is_ours``: False: nothing is written any more."""
        self._path, self._is_ours = path, is_ours
        self._lost = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _set_aside(path, step)
            path.touch()
        except OSError as error:
            if error.errno in PASSING:
                raise
            fix = "give a file in a folder you can write to"
            rule = f"it cannot be written: {error.strerror}"
            raise ConfigError(Fault("--metrics-file", str(path), rule, fix)) from error

    def write(self, record: Record) -> None:
        """A line that cannot be written is lost, which is said once: the next may fit again."""
        values = {name: value if _is_plain(value) else None for name, value in record.items()}
        try:
            append_line(self._path, values, self._is_ours)
        except OSError as error:
            if not self._lost:
                complain(f"warning: {self._path} cannot be written: {error.strerror}")
            self._lost += 1

    def close(self) -> None:
        """Say what is missing; every line was written at once."""
        if self._lost:
            complain(f"warning: {self._path} lacks {self._lost} records")


def append_line(path: Path, values: Record, is_ours: Callable[[], bool] = lambda: True) -> None:
    """Add ``values`` as a line of JSON where ``is_ours``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    if not is_ours():
        return
    line = (json.dumps(values) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        if file.write(line) < len(line):  # the disk is full after a part of it
            file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    remove_leftovers(path.parent, re.escape(path.name))
    draft = aside(path)
    try:
        draft.write_text("".join(stay), encoding="utf-8")
        with path.with_name(path.name + ".replaced").open("a", encoding="utf-8") as file:
            file.writelines(line for line, at in zip(lines, steps, strict=True) if at > step)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _step_of(line: str) -> float:
    """Infinite for what is no record: a line cut off when the process was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def promised_checkpoints(config: PretrainConfig) -> list[str]:
    """What the metrics file says of checkpoints that must have been written, a line for each.

    A save is due after the step it is named after, and is waited for when the next one is.
    """
    every, name = config.checkpoint.save_interval, config.log.metrics_file
    if every is None or name is None or not Path(name).is_file():
        return []
    lines = Path(name).read_text(encoding="utf-8", errors="replace").splitlines()
    last = max((step for step in map(_step_of, lines) if math.isfinite(step)), default=0)
    if last <= every * (2 if config.checkpoint.async_save else 1):
        return []
    return [f"{name} goes up to step {last:,.0f}, and a checkpoint is due every {every:,} steps"]


class TensorBoard:
    """Event files; a record's fields become ``train/...``, ``valid/...`` or ``test/...``."""

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
    """A wandb run; with ``--wandb-mode offline`` nothing leaves the machine. wandb reads what no
    flag says from its environment variables.

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
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError, ValueError) as error:
            fix = "run `wandb login`, or add --wandb-mode offline"
            raise ConfigError(
                Fault("--wandb-project", log.wandb_project, f"wandb does not start: {error}", fix)
            ) from error
        if not self._run.disabled:
            tracking["wandb"] = self._run.id

    def write(self, record: Record) -> None:
        self._run.log(_tagged(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _tagged(record: Record) -> dict[str, float]:
    part = next((name for name in ("valid", "test") if f"{name}_loss" in record), "train")
    numbers = {name: value for name, value in record.items() if not isinstance(value, dict)}
    for name, values in record.items():
        if isinstance(values, dict):
            numbers |= {f"{name}/{key}": value for key, value in values.items()}
    return {
        f"{part}/{name.removeprefix(f'{part}_')}": float(value)
        for name, value in numbers.items()
        if name != "step"
    }


def _missing(flag: str, value: object, package: str) -> ConfigError:
    fix = f"pip install {package}, or drop {flag}"
    return ConfigError(Fault(flag, value, f"the package {package} is not installed", fix))
