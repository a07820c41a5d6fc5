"""Asked to stop early (L5): by a signal or the clock. The ranks decide together, see
:func:`~megatron_kvshare.train.anomaly.vote`, so that all save after the same step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from megatron_kvshare.errors import STOP_SIGNALS

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
