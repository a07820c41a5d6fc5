"""Runs whose saves meet something: a slow disk, a full one, the end of the process."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_kvshare.checkpoint import save as saving
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.agreement import StopWish
from megatron_kvshare.train.loop import train
from megatron_kvshare.train.metrics import Metrics
from megatron_kvshare.train.profiling import Profiling
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.sinks import Record
from tests.distributed.world import PATIENCE_SECONDS, Layout
from tests.integration.pretrain_jobs import Log, Outcome, config_of, run_pretrain


@contextlib.contextmanager
def writing(instead: Callable[..., None]) -> Iterator[None]:
    """Inside, checkpoints are written by `instead(write, parts, folder, group)`."""
    write = saving.write_parts
    saving.write_parts = lambda *arguments: instead(write, *arguments)
    try:
        yield
    finally:
        saving.write_parts = write


class Gate(Log):
    """A log that lets writers through when it has seen a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step
        self._open = threading.Event()

    def write(self, record: Record) -> None:
        super().write(record)
        if record["step"] >= self._step:
            self._open.set()

    def pass_through(self, write: Callable[..., None], *arguments: Any) -> None:
        assert self._open.wait(PATIENCE_SECONDS / 2), (
            "training does not go on while a checkpoint is written"
        )
        write(*arguments)


def train_on_while_saving(
    state: ParallelState, layout: Layout, flags: list[str], step: int
) -> list[Record]:
    """Nothing is written before `step` is logged; returns the log."""
    gate = Gate(step)
    run = prepare(RunPlan.of(config_of(layout, flags), state.world_size), state)
    with writing(gate.pass_through):
        train(
            run,
            Metrics([gate], run.config.train.train_iters, 1.0, 1.0),
            StopWish(None),
            Profiling(run.config, run.state),
        )
    run.saver.close()
    return gate.records


def run_on_a_small_disk(
    state: ParallelState, layout: Layout, flags: list[str], rank: int, limit: int
) -> Outcome:
    """`run_pretrain`; on `rank` no file may get larger than `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if state.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return run_pretrain(state, layout, flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_with_blocked_saves(
    state: ParallelState, layout: Layout, flags: list[str], steps: tuple[int, ...]
) -> Outcome:
    """`run_pretrain`; in the saves of these steps a folder is where the first rank's file has to
    be."""

    def blocked(write: Callable[..., None], parts: Any, folder: Path, group: Any) -> None:
        if folder.name.startswith(tuple(f"iter_{step:07d}." for step in steps)):
            (folder / "__0_0.distcp").mkdir(exist_ok=True)
        write(parts, folder, group)

    with writing(blocked):
        return run_pretrain(state, layout, flags)


def main() -> None:
    """Train by the words of the command line; be killed while the second checkpoint is written."""
    from megatron_kvshare.cli.main import main as kvshare

    count = 0

    def killed(write: Callable[..., None], *arguments: Any) -> None:
        nonlocal count
        count += 1
        write(*arguments)
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with writing(killed):
        sys.exit(kvshare(sys.argv[1:]))


if __name__ == "__main__":
    main()
