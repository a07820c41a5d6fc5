"""The one thread that owns the engine: it takes orders, and hands out what steps have brought."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from megatron_kvshare.errors import KVShareError
from megatron_kvshare.serving.engine import Engine, EngineStats
from megatron_kvshare.serving.request import Output, Request


class Submit(NamedTuple):
    """All of ``requests``, or none. ``accepted`` is told how many the engine has taken and, where
    it has refused one and is rid of them again, why."""

    requests: tuple[Request, ...]
    accepted: Callable[[int, KVShareError | None], None]


class Cancel(NamedTuple):
    """Requests that nobody waits for; those that have ended are ignored."""

    ids: tuple[str, ...]


class Stop(NamedTuple):
    """The last order."""


class Receiver(Protocol):
    """Who is told; called in the engine's thread."""

    def brought(self, outputs: list[Output], stats: EngineStats) -> None: ...

    def failed(self, error: Exception) -> None: ...


class EngineThread:
    """Runs steps while there is work; an error of the engine ends it."""

    def __init__(self, engine: Engine, receiver: Receiver) -> None:
        self._engine, self._receiver = engine, receiver
        self._orders: queue.SimpleQueue[Submit | Cancel | Stop] = queue.SimpleQueue()
        # A step that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def order(self, order: Submit | Cancel | Stop) -> None:
        """Carried out before the next step; from any thread."""
        self._orders.put(order)

    def join(self, seconds: float) -> bool:
        """Wait for the end after :class:`Stop`, and whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._carry_out():
                self._receiver.brought(self._engine.step(), self._engine.stats())
            self._engine.close()
        except Exception as error:
            self._receiver.failed(error)

    def _carry_out(self) -> bool:
        """The orders so far, or one where there is nothing else to do; False after the last."""
        waits = not self._engine.has_work
        while waits or not self._orders.empty():
            order = self._orders.get()
            waits = False
            match order:
                case Submit():
                    self._submit(order)
                case Cancel():
                    for request_id in order.ids:
                        self._engine.cancel(request_id)
                case Stop():
                    return False
        return True

    def _submit(self, order: Submit) -> None:
        taken: list[str] = []
        try:
            for request in order.requests:
                self._engine.submit(request)
                taken.append(request.id)
        except KVShareError as error:
            for request_id in taken:
                self._engine.cancel(request_id)
            order.accepted(len(taken), error)
        else:
            order.accepted(len(taken), None)
