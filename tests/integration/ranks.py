"""Ranks as processes of their own, to be killed and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.distributed.world import PATIENCE_SECONDS, free_port
from tests.integration.pretrain_jobs import SMALL

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}


PROGRAM = ("-m", "megatron_kvshare")


class Ranks:
    """One start of a job; `output(rank)` is what a rank said."""

    def __init__(
        self, folder: Path, count: int, flags: list[str], program: Sequence[str] = PROGRAM
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(count)]
        command = [sys.executable, *program, "pretrain", *SMALL, *flags]
        port = str(free_port())
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            environment = {**os.environ, **ENVIRONMENT, **place, "MASTER_PORT": port}
            with log.open("w") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            self.processes.append(process)

    def wait(self, timeout: float = PATIENCE_SECONDS) -> list[int]:
        """Exit codes."""
        end = time.monotonic() + timeout
        return [each.wait(max(0.1, end - time.monotonic())) for each in self.processes]

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """False where all ranks have ended before."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if all(each.poll() is not None for each in self.processes):
                return condition()
            assert time.monotonic() < end, self.output(0)
            time.sleep(0.001)
        return True

    def one_has_ended(self) -> bool:
        return any(each.poll() is not None for each in self.processes)

    def kill(self, *ranks: int, number: signal.Signals = signal.SIGKILL) -> None:
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(number)

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text()


@contextlib.contextmanager
def started(
    folder: Path, count: int, flags: list[str], program: Sequence[str] = PROGRAM
) -> Iterator[Ranks]:
    """Ranks that are gone when the block is left."""
    ranks = Ranks(folder, count, flags, program)
    try:
        yield ranks
    finally:
        ranks.kill()
        ranks.wait()


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
