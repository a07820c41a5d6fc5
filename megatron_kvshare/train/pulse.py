"""What a rank is doing (L5), as the training loop tells it and the watchdog reads it."""

from __future__ import annotations

import time
from typing import NamedTuple

SETTING_UP, BUILDING, LOADING = "setting up", "building the model", "loading the checkpoint"
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
