"""What ranks decide together: that an error on one of them ends all, whether a step was finite, and
to stop early, asked by a signal or the clock, so that all save after the same step."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_kvshare.errors import STOP_SIGNALS, KVShareError
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects
from megatron_kvshare.output import complain


@contextlib.contextmanager
def together(state: ParallelState) -> Iterator[None]:
    """Leave the block on all ranks or on none; the lowest rank with an error raises it, once.

    The block must not end in the middle of communication that other ranks still wait in.

    Raises:
        KVShareError: the error of this rank, where it is the first one.
        SystemExit: the error belongs to another rank, which reports it.
    """
    error: KVShareError | None = None
    try:
        yield
    except KVShareError as caught:
        error = caught
    codes = gather_objects(0 if error is None else error.exit_code)
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return
    if error is not None and failed[0] == state.rank:
        raise error
    raise SystemExit(codes[failed[0]])


def warn(state: ParallelState, *warnings: str) -> None:
    """Tell the user, once for all ranks."""
    if state.is_first:
        for warning in warnings:
            complain(f"warning: {warning}")


class Votes(NamedTuple):
    """``finite``: on every rank; ``stop``: the largest wish of any rank, 0 to go on."""

    finite: bool
    stop: int


def vote(values: tuple[float, ...], stop: int, state: ParallelState) -> Votes:
    """Whether ``values`` are finite and whether to stop after this step, by one collective."""
    finite = all(map(math.isfinite, values))
    if state.world_size == 1:
        return Votes(finite, stop)
    ballot = torch.tensor([int(not finite), stop], device=state.platform.device)
    dist.all_reduce(ballot, op=dist.ReduceOp.MAX)
    broken, wish = ballot.tolist()
    return Votes(not broken, wish)


CLOCK = 1
"""The wish to stop because time is up; below the number of every stop signal."""
LOST = 128
"""The wish to stop because another run writes to the folder now; above all of them."""


class StopWish:
    """What this process has been asked for so far."""

    def __init__(self, minutes: float | None) -> None:
        """``minutes``: from now until time is up; None: never."""
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal = 0
        self._lost = False

    def now(self) -> int:
        """0: go on; else the number of a signal, :data:`CLOCK` or :data:`LOST`."""
        if self._lost:
            return LOST
        if self._signal or self._deadline is None:
            return self._signal
        return CLOCK if time.monotonic() >= self._deadline else 0

    def lose(self) -> None:
        """Another run has taken over; any thread may call this."""
        self._lost = True

    def heed(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: the step goes on to its end. A second Ctrl-C does not wait for it."""
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


@contextlib.contextmanager
def stop_wish(minutes: float | None) -> Iterator[StopWish]:
    """Heed the stop signals inside; for the main thread only."""
    wish = StopWish(minutes)
    before = {number: signal.signal(number, wish.heed) for number in STOP_SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reason(wish: int) -> str:
    """A wish in words."""
    return "--exit-duration-in-mins" if wish == CLOCK else signal.Signals(wish).name
