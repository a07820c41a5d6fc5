"""Ranks that hang or die: the job ends within ``--distributed-timeout-minutes`` and says which
rank it was, in which step.

A thread of every rank writes signs of life to the store of the launcher. A rank that has not moved
for too long, or whose communication broke, reads those of the others: who gives none is lost, the
others say what they wait in.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from megatron_kvshare.errors import EXIT_LOST, Fault, LostError, runs
from megatron_kvshare.megatron_api.memory import shortage
from megatron_kvshare.megatron_api.parallel import ParallelState, launcher_store
from megatron_kvshare.output import complain

SETTING_UP, COMPILING = "setting up", "compiling kernels"
BUILDING, LOADING = "building the model", "loading the checkpoint"
VALIDATION, SAVING = "validation", "saving"
"""What a rank does apart from training, in messages; advice about memory depends on it."""


class Doing(NamedTuple):
    """``what`` began in ``step`` at ``since`` (monotonic seconds)."""

    step: int
    what: str
    since: float


class Pulse:
    """Written by the main thread, read by another."""

    def __init__(self) -> None:
        self.now = Doing(0, SETTING_UP, time.monotonic())

    def beat(self, what: str, step: int | None = None) -> None:
        """Something new begins, in the same step unless it says so."""
        self.now = Doing(self.now.step if step is None else step, what, time.monotonic())


STORE_PATIENCE = 5.0
"""Seconds after which a store that does not answer counts as gone."""
_LONGEST_INTERVAL = 5.0
"""Seconds between two signs of life, shorter where the limit is short."""


class Sign(NamedTuple):
    """A rank's sign of life; ``count`` grows with each."""

    count: int
    step: int
    what: str
    host: str
    pid: int

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.what}"


@contextlib.contextmanager
def watched(
    pulse: Pulse, state: ParallelState, limit: float, release: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Watch this rank inside; ``limit``: seconds it may stay at one thing; ``release`` gives back
    what the process holds for others to have.

    A rank that hangs is reported, and its process ended with EXIT_LOST, by a thread: nothing else
    can leave a collective.

    Raises:
        LostError: communication broke because a rank has died; on the lowest rank that lives.
        SystemExit: the same, on the others.
    """
    watchdog = _Watchdog(pulse, state, limit, release)
    watchdog.start()
    try:
        yield
    except RuntimeError as error:
        if _is_communication(error):
            watchdog.explain(error)
        raise
    finally:
        watchdog.stop()


def _is_communication(error: RuntimeError) -> bool:
    if shortage(error):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


class _Watchdog(threading.Thread):
    def __init__(
        self, pulse: Pulse, state: ParallelState, limit: float, release: Callable[[], None]
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._pulse, self._limit, self._state = pulse, limit, state
        self._release = release
        self._interval = min(_LONGEST_INTERVAL, limit / 8)
        self._store = launcher_store(state)
        self._count = 0
        self._done = threading.Event()
        self._telling = threading.Lock()

    def run(self) -> None:
        self._give_sign()
        while not self._done.wait(self._interval):
            self._give_sign()
            if time.monotonic() - self._pulse.now.since > self._limit:
                with self._telling:
                    self._end_hang()

    def stop(self) -> None:
        self._done.set()
        self.join()

    def explain(self, error: RuntimeError) -> None:
        """Raise what is behind broken communication; return if every rank still lives."""
        with self._telling:
            before, after = self._two_looks()
            lost = silent(before, after)
            if lost and self._state.is_first:  # its store is where the others look
                time.sleep(2 * self._interval)
        if not lost:
            return
        if self._speaker(lost) != self._state.rank:
            raise SystemExit(EXIT_LOST)
        raise LostError(self._fault(report(before, after), str(error).splitlines()[0])) from None

    def _give_sign(self) -> None:
        self._count += 1
        if self._store is not None:
            write = partial(self._store.set, str(self._state.rank), json.dumps(self._sign()))
            in_time(write, STORE_PATIENCE)

    def _sign(self) -> Sign:
        now = self._pulse.now
        return Sign(self._count, now.step, now.what, socket.gethostname(), os.getpid())

    def _end_hang(self) -> None:
        before, after = self._two_looks()
        if self._speaker(silent(before, after)) == self._state.rank:
            why = f"nothing has moved for {self._limit:.0f} s (--distributed-timeout-minutes)"
            fault = self._fault(report(before, after), why)
            complain(str(LostError(fault)))
        complain(f"[rank {self._state.rank}] is here:\n{main_stack()}")
        leave(EXIT_LOST, self._release)

    def _fault(self, lines: Sequence[str], why: str) -> Fault:
        where = f"step {self._pulse.now.step}"
        fix = "look at the rank that is behind; started again with --resume auto, the run goes on"
        return Fault(where, why, "; ".join(lines), fix)

    def _speaker(self, lost: Sequence[int]) -> int:
        """The lowest rank that lives."""
        return min(set(range(self._state.world_size)) - set(lost), default=self._state.rank)

    def _two_looks(self) -> tuple[list[Sign | None], list[Sign | None]]:
        """The signs of all ranks, twice, with time for each to give another in between."""
        before = self._look()
        for _ in range(3):
            time.sleep(self._interval)
            self._give_sign()
        return before, self._look()

    def _look(self) -> list[Sign | None]:
        store, ranks = self._store, range(self._state.world_size)
        if store is None:
            return [self._sign()]
        found = in_time(lambda: [read_sign(store, rank) for rank in ranks], STORE_PATIENCE)
        if found is None:  # the store is gone, and with it the first rank's host
            return [None if rank == 0 else Sign(self._count, 0, "", "", 0) for rank in ranks]
        return found


def leave(code: int, release: Callable[[], None]) -> NoReturn:
    """End this process from any thread, whatever the others do; a disk that hangs delays it."""
    in_time(release, STORE_PATIENCE)
    os._exit(code)


def in_time(action: Callable[[], Any], seconds: float) -> Any:
    """What ``action`` returns, or None where it fails or takes longer: torch's store has no limit
    for a host that is there and does not answer."""
    results: list[Any] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            results.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def read_sign(store: Any, rank: int) -> Sign | None:
    """The last sign of life of a rank."""
    key = str(rank)
    return Sign(*json.loads(store.get(key))) if store.check([key]) else None


def silent(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> list[int]:
    """Ranks that have given no sign of life between two looks."""
    pairs = enumerate(zip(before, after, strict=True))
    return [rank for rank, (old, new) in pairs if new is None or (old and old.count == new.count)]


def report(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> list[str]:
    """Who is lost, and what the others wait in, those that are behind first."""
    lost = silent(before, after)
    lines = [_lost_line(rank, after[rank]) for rank in lost]
    places: dict[tuple[int, str], list[int]] = {}
    for rank, sign in enumerate(after):
        if rank not in lost and sign is not None and sign.what:
            places.setdefault((sign.step, sign.place), []).append(rank)
    for (_, place), ranks in sorted(places.items()):
        lines.append(f"{'ranks' if ranks[1:] else 'rank'} {runs(ranks)} in {place}")
    return lines


def _lost_line(rank: int, sign: Sign | None) -> str:
    if sign is None:
        return f"rank {rank} gives no sign of life"
    return (
        f"rank {rank} (process {sign.pid} on {sign.host}) gives no sign of life, it was last seen"
        f" in {sign.place}"
    )


def main_stack() -> str:
    """Where the main thread is, its last few calls."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame)[-12:]).rstrip()
