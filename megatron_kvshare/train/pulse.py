"""What a rank is doing (L5), as the training loop tells it and the watchdog reads it."""

from __future__ import annotations

import time
from typing import NamedTuple


class Doing(NamedTuple):
    """``what`` began in ``step`` at ``since`` (monotonic seconds)."""

    step: int
    what: str
    since: float


class Pulse:
    """Written by the main thread, read by another."""

    def __init__(self) -> None:
        self.now = Doing(0, "setting up", time.monotonic())

    def beat(self, what: str, step: int | None = None) -> None:
        """Something new begins, in the same step unless it says so."""
        self.now = Doing(self.now.step if step is None else step, what, time.monotonic())
