"""A rank that has to leave ends all ranks, wherever the others are.

They wait in a collective for the one that leaves, so it puts a note into the store of the launcher.
A thread of every rank looks for one and ends its process: nothing else can leave a collective.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_kvshare.errors import EXIT_USER_ERROR, KVShareError
from megatron_kvshare.megatron_api.parallel import ParallelState, launcher_store
from megatron_kvshare.output import complain
from megatron_kvshare.train.watchdog import STORE_PATIENCE, in_time, leave

_INTERVAL = 1.0
"""Seconds between two looks for a note."""
_GATHERING = 1.0
"""Seconds in which ranks that have to leave for the same reason write theirs: often all do."""
_PATIENCE = 20.0
"""Seconds the first rank waits for the others to have read it: its store may be where they look."""
_WRITERS, _MESSAGE, _LEFT = "notes/writers", "notes/of/", "notes/left"


class Notes:
    """What ranks that leave tell the others; with a single process there is nobody to tell."""

    def __init__(self, state: ParallelState, release: Callable[[], None]) -> None:
        """``release``: called before this process ends."""
        self._release = release
        self._rank, self._world_size = state.rank, state.world_size
        self._store = launcher_store(state)
        self._done = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="notes", daemon=True)

    def listen(self) -> None:
        """From now on a note of another rank ends this process."""
        if self._store is not None:
            self._thread.start()

    def stop_listening(self) -> None:
        """Returns only where no note was heeded."""
        self._done.set()
        if self._store is not None:
            self._thread.join()

    def heed(self) -> None:
        """End this process if there is a note: what went wrong here is a consequence."""
        if self._writers():
            self._leave()

    def end_all(self, error: KVShareError) -> NoReturn:
        """End all ranks with the exit code of user errors. The first rank prints ``error``, or that
        of a lower rank if there are several.

        Raises:
            KVShareError: ``error``, where this is the only process.
        """
        if self._store is None:
            raise error

        def write(store: Any) -> bool:
            store.set(f"{_MESSAGE}{self._rank}", str(error))
            store.append(_WRITERS, f"{self._rank} ")
            return True

        if not self._ask(write):  # the store is gone, and with it the first rank
            complain(str(error))
        time.sleep(_GATHERING)
        self._leave()

    def _look(self) -> None:
        while not self._done.wait(_INTERVAL):
            if self._writers() and not self._done.wait(_GATHERING):
                self._leave()

    def _leave(self) -> NoReturn:
        with self._leaving:  # both threads may come here: one of them is enough
            if self._rank == 0:
                self._tell()
            self._ask(lambda store: store.add(_LEFT, 1))
            deadline = time.monotonic() + _PATIENCE
            while self._rank == 0 and self._others_are_here() and time.monotonic() < deadline:
                time.sleep(_INTERVAL / 10)
            leave(EXIT_USER_ERROR, self._release)

    def _tell(self) -> None:
        """Print the message of the lowest rank that left one: in the output of the first rank,
        where all is that concerns the whole job."""
        key = f"{_MESSAGE}{min(self._writers(), default=0)}"
        message = self._ask(lambda store: store.get(key) if store.check([key]) else b"")
        if message:
            complain(message.decode())

    def _others_are_here(self) -> bool:
        left = self._ask(lambda store: store.add(_LEFT, 0))
        return left is not None and left < self._world_size

    def _writers(self) -> list[int]:
        """Ranks that have left a note."""
        found = self._ask(lambda store: store.get(_WRITERS) if store.check([_WRITERS]) else b"")
        return [int(rank) for rank in (found or b"").split()]

    def _ask(self, action: Callable[[Any], Any]) -> Any:
        """What the store answers; None where it is gone, or never was."""
        store = self._store
        return None if store is None else in_time(lambda: action(store), STORE_PATIENCE)
