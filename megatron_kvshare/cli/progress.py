"""A progress line with the time that is left, on stderr."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Rewritten in place on a terminal, every 30 s elsewhere."""

    def __init__(self, started: float | None = None) -> None:
        self.started = time.monotonic() if started is None else started
        self.in_place = sys.stderr.isatty()
        self.pause = 0.5 if self.in_place else 30.0
        self.last = self.started

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self.started, 1e-9)

    def show(self, share: float | None, text: str, begun: float = 0.0) -> None:
        """``share`` of the work is done (None: nobody knows how much there is), ``begun`` of it
        before the start; ``text`` says it in its own units."""
        is_end = share is not None and share >= 1
        if self.elapsed + self.started - self.last < self.pause and not (is_end and self.in_place):
            return
        self.last = self.elapsed + self.started
        line = text if share is None else self._with_share(min(1.0, share), text, begun)
        end = ("\n" if is_end else "") if self.in_place else "\n"
        print(f"\r{line:<79}" if self.in_place else line, end=end, file=sys.stderr, flush=True)

    def _with_share(self, share: float, text: str, begun: float) -> str:
        done = share - begun
        left = f"{self.elapsed * (1 - share) / done:.0f} s" if done > 0 else "not known yet"
        return f"{share:4.0%}  {text}  ETA {left}"
