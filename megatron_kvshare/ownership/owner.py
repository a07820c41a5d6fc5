"""Taking a place, keeping it and giving it back.

The owner touches its claim every few seconds. A newcomer takes over at once where the owner is
certainly gone, else it watches for three of these heartbeats, by its own clock: no two machines'
clocks are compared. An owner that was suspended meanwhile finds a higher claim, and writes no more.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.errors import Fault, OwnershipError
from megatron_kvshare.output import complain
from megatron_kvshare.ownership.claims import (
    Claim,
    Seen,
    highest,
    look,
    new_claim,
    numbers,
    publish,
    remove_others,
)
from megatron_kvshare.ownership.process import Process, this_process

HEARTBEAT = 5.0
"""Seconds between two heartbeats."""
_PATIENCE = 3
"""Heartbeats that a newcomer waits, and without which an owner counts as gone."""
_SECOND_LOOK = 0.5
"""Seconds after which an owner looks again before it takes itself for replaced."""
_LOOKS = 5
"""Looks of a newcomer per heartbeat."""

Say = Callable[[str], None]


def _warn(text: str) -> None:
    complain(f"warning: {text}")


class Place(NamedTuple):
    """What is owned: claims are files ``lock.1``, ...; ``flag`` and ``value`` name it to the
    user."""

    lock: Path
    flag: str
    value: str


def folder_place(flag: str, folder: str) -> Place:
    """A folder and all in it."""
    return Place(Path(os.path.realpath(folder), "run.lock"), flag, folder)


def file_place(flag: str, path: str) -> Place:
    """A file, or what begins with this name; the claims lie beside it."""
    real = Path(os.path.realpath(path))
    return Place(real.with_name(f"{real.name}.lock"), flag, path)


@contextlib.contextmanager
def owned(*places: Place, say: Say = _warn) -> Iterator[None]:
    """Own all ``places`` inside; for work that is done in one go.

    Raises:
        OwnershipError: one belongs to another process.
        OSError: nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        for place in sorted(set(places)):
            stack.callback(take(place, say=say).release)
        yield


def take(
    place: Place,
    heartbeat: float = HEARTBEAT,
    say: Say = _warn,
    on_loss: Callable[[], None] = lambda: None,
    here: Process | None = None,
) -> Ownership:
    """Own ``place`` until :meth:`Ownership.release`.

    Args:
        place: its folder is made where it is missing.
        heartbeat: seconds between two signs of life.
        say: is told a warning where a silent owner is replaced.
        on_loss: called by a thread when another process has taken over.
        here: the current process.

    Raises:
        OwnershipError: it belongs to another process.
        OSError: nothing can be written there.
    """
    here = here or this_process()
    mine, made = _claimed(place, new_claim(here, heartbeat), here, say)
    return Ownership(place, mine, made, on_loss)


def _claimed(place: Place, claim: Claim, here: Process, say: Say) -> tuple[Seen, list[Path]]:
    """The published claim, and the folders that were made for it, the deepest first."""
    watch: _Watch | None = None
    made: list[Path] = []
    while True:
        seen = highest(place.lock, claim.interval)
        if seen is not None:
            if watch is None or watch.token != seen.claim.token:
                watch = _Watch(place, seen)
            if not watch.is_over(seen, here, say):
                time.sleep(watch.pause)
                continue
        number = 1 if seen is None else seen.number + 1
        made += _make_folder(place.lock.parent)  # the owner before may have removed it again
        path = publish(place.lock, number, claim)
        if path is None:
            continue
        if _is_undisputed(place.lock, number, seen):
            break
        path.unlink(missing_ok=True)
    if watch is not None and seen is not None and watch.was_silent:
        say(f"{place.flag} {place.value}: taken over from {seen.claim}, which shows no life")
    remove_others(place.lock, number)
    return Seen(number, path, claim, 0), made


def _is_undisputed(lock: Path, number: int, judged: Seen | None) -> bool:
    """Whether a claim just published is the highest, and replaces the one that was judged: a
    process that slept between its look and its claim has judged an owner of old."""
    found = numbers(lock)
    others = found.keys() - {number}
    if max(found, default=0) != number:
        return False
    if judged is None or judged.number not in others:
        return not others
    try:
        now = look(judged.number, judged.path, judged.claim.interval)
    except FileNotFoundError:
        return False
    return now.claim.token == judged.claim.token


class _Watch:
    """A newcomer's watch over one claim: silence is counted look by look, so that a file system
    that answers nobody for a while does not make a living owner look dead."""

    def __init__(self, place: Place, seen: Seen) -> None:
        self.token = seen.claim.token
        self.pause = seen.claim.interval / _LOOKS
        self.was_silent = False
        self._place, self._limit = place, _PATIENCE * seen.claim.interval
        self._beat = seen.beat
        self._waited = self._silence = 0.0
        self._last = 0.0

    def is_over(self, seen: Seen, here: Process, say: Say) -> bool:
        """Whether the claim may be replaced now; ``say`` is told of the first wait.

        Raises:
            OwnershipError: it is alive, and was given time enough to end.
        """
        now, is_first_look = time.monotonic(), self._last == 0
        passed = 0.0 if is_first_look else min(now - self._last, 2 * self.pause)
        self._last = now
        self._waited += passed
        self._silence = self._silence + passed if seen.beat == self._beat else 0.0
        self._beat = seen.beat
        owner = seen.claim.process
        life = "unknown" if owner is None else here.life_of(owner)
        if life == "dead" or (owner is not None and here.requeued(owner)):
            return True
        if is_first_look:
            place, seconds = self._place, f"{self._limit:.0f} s"
            text = f"{place.flag} {place.value} belongs to {seen.claim}"
            say(f"{text}; waiting up to {seconds} for its end")
        if self._waited < self._limit:
            return False
        if life == "alive" or self._silence < self._limit / 2:
            raise OwnershipError(_in_use(self._place, seen, life == "alive"))
        self.was_silent = self._silence >= self._limit
        return self.was_silent


def _in_use(place: Place, seen: Seen, lives_here: bool) -> Fault:
    signs = "it lives" if lives_here else "it gives signs of life"
    rule = f"it belongs to {seen.claim}, and {signs}"
    fix = f"wait for its end, stop it, or choose another {place.flag}"
    return Fault(place.flag, place.value, rule, fix)


def _make_folder(folder: Path) -> list[Path]:
    """Make what is missing of the path; returns what was missing, the deepest first."""
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


class Ownership:
    """A place that this process owns; a thread gives signs of life."""

    def __init__(
        self, place: Place, mine: Seen, made: list[Path], on_loss: Callable[[], None]
    ) -> None:
        """``made``: folders that were made for the claim, the deepest first."""
        self._place, self._mine, self._made, self._on_loss = place, mine, made, on_loss
        self._loss: OwnershipError | None = None
        self._done = threading.Event()
        self._releasing = threading.Lock()
        self._thread = threading.Thread(target=self._live, name="ownership", daemon=True)
        self._thread.start()

    def holds(self) -> bool:
        """Whether the place is still owned; asked before every single write.

        Raises:
            OSError: the file system does not answer.
        """
        if self._loss is None and (reason := self._reason_of_loss()):
            fix = "let the other go on, or stop it and start this one again"
            self._loss = OwnershipError(Fault(self._place.flag, self._place.value, reason, fix))
            self._on_loss()
        return self._loss is None

    def check(self) -> None:
        """Ask before a result gets its name.

        Raises:
            OwnershipError: another process has taken over.
            OSError: the file system does not answer.
        """
        if not self.holds():
            assert self._loss is not None
            raise self._loss

    def release(self) -> None:
        """Give the place back; nothing remains of the claim. Further calls do nothing."""
        with self._releasing:
            if self._done.is_set():
                return
            self._done.set()
        self._thread.join(self._mine.claim.interval)
        with contextlib.suppress(OSError):
            mine = self._mine
            if self._owns(look(mine.number, mine.path, mine.claim.interval)):
                mine.path.unlink()
            for folder in self._made:
                folder.rmdir()  # not where it holds anything

    def _live(self) -> None:
        while not self._done.wait(self._mine.claim.interval):
            # A file system may have a bad moment: newcomers wait for several heartbeats.
            with contextlib.suppress(OSError):
                if not self.holds():
                    return
                now = time.time_ns()
                os.utime(self._mine.path, ns=(now, now))

    def _reason_of_loss(self) -> str:
        """Empty where there is none."""
        if self._done.is_set():
            return "this process has given it back"
        lock, interval = self._place.lock, self._mine.claim.interval
        other = highest(lock, interval)
        if other is not None and not self._owns(other):
            # A newcomer that has judged an owner of old withdraws at once.
            time.sleep(_SECOND_LOOK)
            other = highest(lock, interval)
        if other is None:
            return f"the claim of this process, {self._mine.path}, was removed"
        return "" if self._owns(other) else f"{other.claim}, has taken over"

    def _owns(self, seen: Seen) -> bool:
        return seen.claim.token == self._mine.claim.token
