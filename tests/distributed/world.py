"""One world of worker processes for all distributed tests.

Importing torch and megatron-core in four processes takes many seconds, so the processes start once
and then take jobs: `world.run(function, layout, ...)` runs a module-level function on the first
ranks of the world, under the parallel groups of that layout, and returns what every rank returned.
The groups are kept for the next job and made anew when its layout differs: making them costs more
than most jobs. A job that raises, hangs or loses a worker ends the whole
world, and the next job starts a fresh one: after a failure in the middle of a collective nothing in
the old processes can be relied on.

This module must stay cheap to import: workers set their environment before anything imports torch.
"""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

PATIENCE_SECONDS = 600
"""After this, something hangs: many times what any job takes, on a machine that is busy with others
too. No test counts on it."""
_FIRST_PORT, _LAST_PORT, _PORTS_EACH = 20_000, 32_000, 100


@dataclass(frozen=True)
class Layout:
    """Ranks of one job: data- times tensor- times pipeline-parallel size of them."""

    tensor: int = 1
    data: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    @property
    def groups(self) -> tuple[int, ...]:
        """What the parallel groups depend on."""
        return self.tensor, self.data, self.pipeline, self.virtual

    def __str__(self) -> str:
        stages = f"-pp{self.pipeline}-vpp{self.virtual}" * (self.pipeline > 1)
        return f"tp{self.tensor}{'-sp' * self.sequence_parallel}-dp{self.data}{stages}"


class WorkerError(RuntimeError):
    """A job failed: the remote traceback, a crash or a timeout."""


class World:
    """Long-lived workers; `size` is the largest number of ranks a job may use."""

    def __init__(self, size: int, environment: dict[str, str] | None = None):
        self.size = size
        self._environment = environment or {}
        self._workers: list[tuple[SpawnProcess, Connection]] = []
        self._groups: tuple[int, ...] | None = None

    def run(
        self,
        function: Callable[..., Any],
        layout: Layout,
        *arguments: Any,
        timeout_seconds: float = PATIENCE_SECONDS,
    ) -> list[Any]:
        """`function(state, layout, *arguments)` on every rank of the layout; results in the order
        of ranks.

        `function` must be importable by name; `state` is the rank's ParallelState. Raises
        WorkerError with the traceback of the first rank that failed.
        """
        if layout.world_size > self.size:
            raise ValueError(f"{layout} needs {layout.world_size} ranks, the world has {self.size}")
        self._start()
        workers = self._workers[: layout.world_size]
        port = None if layout.groups == self._groups else free_port()
        self._groups = layout.groups
        job = pickle.dumps((port, function, layout, arguments))
        try:
            for _, connection in workers:
                connection.send_bytes(job)
            return self._collect(workers, time.monotonic() + timeout_seconds)
        except BaseException:
            self.close()
            raise

    def forget_groups(self) -> None:
        """The last job has destroyed the parallel groups: the next one starts with new ones."""
        self._groups = None

    def close(self) -> None:
        """Ends every worker at once, in whatever state it is."""
        workers, self._workers = self._workers, []
        self._groups = None
        for process, connection in workers:
            process.kill()
            connection.close()
        for process, _ in workers:
            process.join()

    def _start(self) -> None:
        if all(process.is_alive() for process, _ in self._workers) and self._workers:
            return
        self.close()
        spawn = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = spawn.Pipe()
            environment = {**self._environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = spawn.Process(
                target=serve, args=(theirs, environment, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, workers: list[tuple[SpawnProcess, Connection]], deadline: float) -> list:
        results: dict[int, Any] = {}
        ranks = {connection: rank for rank, (_, connection) in enumerate(workers)}
        while len(results) < len(workers):
            waiting = [c for c, rank in ranks.items() if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [ranks[c] for c in waiting]
                raise WorkerError(f"no answer from ranks {late} in time")
            for connection in ready:
                rank = ranks[connection]
                results[rank] = receive(connection, rank)
        return [results[rank] for rank in range(len(workers))]


def receive(connection: Connection, rank: int) -> Any:
    """One rank's result, or WorkerError with what went wrong there."""
    try:
        succeeded, content = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError) as lost:
        raise WorkerError(f"worker of rank {rank} died") from lost
    if not succeeded:
        raise WorkerError(f"rank {rank} failed:\n{content}")
    return content


def free_port() -> int:
    """A port that nothing uses, nor will before whoever asks does."""
    _, ports = _own_ports()
    return next(port for port in itertools.islice(ports, _PORTS_EACH) if _is_free(port))


@functools.cache
def _own_ports() -> tuple[socket.socket, Iterator[int]]:
    """A stretch of ports for this process, in turn, and the claim to it: the UDP port of the same
    number as the first. They lie below those that the system gives to whoever asks for any."""
    for first in range(_FIRST_PORT, _LAST_PORT, _PORTS_EACH):
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", first))
        except OSError:  # another test process has it
            claim.close()
            continue
        return claim, itertools.cycle(range(first, first + _PORTS_EACH))
    raise RuntimeError(f"every stretch of ports from {_FIRST_PORT} to {_LAST_PORT} is in use")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As torch's store does: what is left of connections that have ended is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


# In the worker ------------------------------------------------------------------------------------


def serve(connection: Connection, environment: dict[str, str], parent: int) -> None:
    """Runs jobs until the connection ends; a lost parent ends the process within a second."""
    threading.Thread(target=follow_parent, args=(parent,), daemon=True).start()
    os.environ.update({"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **environment})
    groups = Groups()
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        connection.send_bytes(run_job(groups, job))


def follow_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def run_job(groups: Groups, job: bytes) -> bytes:
    """Pickled (True, result) or (False, traceback)."""
    try:
        port, function, layout, arguments = pickle.loads(job)
        if port is not None:
            groups.renew(layout, port)
        return pickle.dumps((True, function(groups.state, layout, *arguments)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


class Groups:
    """The parallel groups of the last job; the next one of the same layout uses them again."""

    def __init__(self) -> None:
        self.state: Any = None

    def renew(self, layout: Layout, port: int) -> None:
        import torch

        from megatron_kvshare.megatron_api import parallel

        torch.set_num_threads(1)
        parallel.destroy()
        self.state = None
        gc.collect()  # what the last job left in cycles holds groups, and each its threads
        renumber_zero_modules()
        os.environ.update({"WORLD_SIZE": str(layout.world_size), "MASTER_PORT": str(port)})
        self.state = parallel.initialize(layout.tensor, layout.pipeline, layout.virtual)


def renumber_zero_modules() -> None:
    """DeepSpeed numbers what ZeRO 3 divides throughout a process, and compares numbers over ranks:
    not all of ours have had the same jobs."""
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        (last,) = offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
        last[0] = offload.Init.param_id = 0
