"""Runs that meet others at what they write to."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_kvshare.errors import KVShareError
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.ownership.claims import new_claim, publish
from megatron_kvshare.ownership.owner import folder_place, take
from megatron_kvshare.ownership.process import Process
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.pretrain import pretrain
from megatron_kvshare.train.report import Typed
from tests.distributed.world import PATIENCE_SECONDS, Layout
from tests.integration.pretrain_jobs import Outcome, config_of, run_pretrain
from tests.integration.saving_jobs import writing

BEAT = 0.1
ELSEWHERE = Process(host="elsewhere", boot="b", namespace="n", pid=77, born=5)


def usurp(save: Path) -> None:
    """Another run takes the folder over, as if this one had been suspended for long."""
    assert publish(folder_place("--save", str(save)).lock, 2, new_claim(ELSEWHERE, BEAT))


def run_usurped_while_saving(
    state: ParallelState, layout: Layout, flags: list[str], save: str, step: int
) -> Outcome:
    """`run_pretrain`; the folder is taken over while the checkpoint of `step` is written."""

    def usurped(write: Callable[..., None], parts: Any, folder: Path, group: Any) -> None:
        write(parts, folder, group)
        if state.is_first and folder.name.startswith(f"iter_{step:07d}."):
            usurp(Path(save))

    with writing(usurped):
        return run_pretrain(state, layout, flags)


def run_usurped_between_saves(
    state: ParallelState, layout: Layout, flags: list[str], save: str, metrics: str
) -> Outcome:
    """The folder is taken over after the second step; only heartbeats can notice."""

    def watch() -> None:
        with contextlib.suppress(FileNotFoundError):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while Path(metrics).read_text().count("\n") < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        usurp(Path(save))

    if state.is_first:
        Path(metrics).touch()
        threading.Thread(target=watch, daemon=True).start()
    try:
        planned = RunPlan.of(config_of(layout, flags), state.world_size)
        run = pretrain(planned, state, Typed([], []), heartbeat=BEAT)
    except KVShareError as error:
        return Outcome(error=str(error))
    except SystemExit as leave:
        return Outcome(error=f"exit {leave.code}")
    return Outcome(run.progress.step)


def main() -> None:
    """Own the folder of the first word until the input ends."""
    ownership = take(folder_place("--save", sys.argv[1]), BEAT)
    print("owned", flush=True)
    sys.stdin.read()
    ownership.release()


if __name__ == "__main__":
    main()
