"""Between HTTP and the engine: which requests are open, whose an output is, who gets no more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from megatron_kvshare.errors import KVShareError
from megatron_kvshare.output import complain
from megatron_kvshare.server.engine_thread import Cancel, EngineThread, Stop, Submit
from megatron_kvshare.server.metrics import Metrics, Timing
from megatron_kvshare.server.refusal import RETRY, Refusal
from megatron_kvshare.serving.engine import Engine, EngineStats
from megatron_kvshare.serving.request import FinishReason, Output, Request

MOST_UNREAD = 1024
"""Outputs of one choice that wait for a client that reads more slowly than the engine writes."""
_STOP_SECONDS = 30.0


class Part(NamedTuple):
    """An output, and which of the client's choices it belongs to."""

    choice: int
    output: Output


class Ticket:
    """The choices of one HTTP request, and what they have brought that is not fetched yet.

    ``unfinished``: choices that the engine still knows. Only the event loop's thread touches it.
    """

    def __init__(self, requests: tuple[Request, ...]) -> None:
        self.requests = requests
        self.unfinished = len(requests)
        self.closed = False
        self.timings = tuple(Timing() for _ in requests)
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parts: deque[Part] = deque()
        self._failure: Refusal | None = None
        self._changed = asyncio.Event()

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(request.id for request in self.requests)

    @property
    def is_full(self) -> bool:
        return len(self._parts) >= MOST_UNREAD * len(self.requests)

    def put(self, part: Part) -> None:
        if not self.closed and self._failure is None:
            self._parts.append(part)
            self._changed.set()

    def fail(self, refusal: Refusal) -> None:
        """Nothing more comes; what has come and was not fetched is dropped."""
        if self._failure is None and not self.closed:
            self._parts.clear()
            self._failure = refusal
            self._changed.set()
            if not self.accepted.done():
                self.accepted.set_exception(refusal)

    async def next(self) -> Part:
        """The next part.

        Raises:
            Refusal: there is no next one.
        """
        while not self._parts:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        return self._parts.popleft()


class Desk:
    """Opens and closes tickets; everything here runs in the event loop's thread, but for
    :meth:`brought` and :meth:`failed`, which the engine's thread calls.

    ``most_open``: choices that may be open at a time. A ticket has its places until its client has
    everything, or has left, and the engine knows it no more.
    """

    def __init__(self, engine: Engine, max_queue: int, metrics: Metrics) -> None:
        self.most_open = engine.settings.max_batch_size + max_queue
        self.draining = False
        self.failure: Exception | None = None
        self._metrics = metrics
        self._thread = EngineThread(engine, self)
        self._owner: dict[str, tuple[Ticket, int]] = {}
        self._tickets: set[Ticket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def check_room(self, wanted: int) -> None:
        """Whether so many choices can be opened now.

        Raises:
            Refusal: they cannot.
        """
        if self.failure is not None:
            raise _engine_failed()
        if self.draining:
            close = {**RETRY, "Connection": "close"}
            raise Refusal(503, "the server is stopping and takes no new requests", headers=close)
        if wanted > self.most_open:
            message = (
                f"{wanted} choices (prompts x n) are more than the {self.most_open} that this"
                " server has places for: send fewer at a time"
            )
            raise Refusal(400, message, param="prompt")
        taken = self.open_choices
        if taken + wanted > self.most_open:
            message = f"all {self.most_open} places are taken ({taken} open): come back later"
            raise Refusal(429, message, code="rate_limit_exceeded", headers=RETRY)

    async def open(self, requests: tuple[Request, ...]) -> Ticket:
        """A ticket that the engine has accepted.

        Raises:
            Refusal: too many are open, or the server is about to end.
            ConfigError: the engine refuses a request.
        """
        self.check_room(len(requests))
        ticket = Ticket(requests)
        self._tickets.add(ticket)
        self._idle.clear()
        for index, request_id in enumerate(ticket.ids):
            self._owner[request_id] = (ticket, index)

        def accepted(taken: int, error: KVShareError | None) -> None:
            self._call(self._accepted, ticket, taken, error)

        self._thread.order(Submit(requests, accepted))
        try:
            await ticket.accepted
        except BaseException:
            self.close(ticket)
            raise
        return ticket

    def close(self, ticket: Ticket) -> None:
        """The client has its answer, or has left: what still runs is cancelled."""
        if ticket.closed:
            return
        ticket.closed = True
        self._cancel(ticket)
        self._tidy(ticket)

    @property
    def open_choices(self) -> int:
        return sum(len(ticket.requests) for ticket in self._tickets)

    async def drain(self, seconds: float) -> None:
        """Take no more requests; open ones may go on for so long, and are then refused."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self.give_up(f"the server is stopping, and {seconds:g} s were not enough for this")

    def give_up(self, reason: str) -> None:
        """Refuse everything that is open."""
        for ticket in tuple(self._tickets):
            ticket.fail(Refusal(503, reason, headers=RETRY))
            self._cancel(ticket)

    async def stop(self) -> None:
        """End the engine's thread."""
        self.draining = True
        self._thread.order(Stop())
        if not await asyncio.to_thread(self._thread.join, _STOP_SECONDS):
            complain(f"warning: the engine's last step has not ended in {_STOP_SECONDS:g} s")

    def brought(self, outputs: list[Output], stats: EngineStats) -> None:
        self._call(self._brought, outputs, stats)

    def failed(self, error: Exception) -> None:
        self._call(self._failed, error)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None, "the engine's thread starts with the event loop"
        self._loop.call_soon_threadsafe(function, *arguments)

    def _accepted(self, ticket: Ticket, taken: int, error: KVShareError | None) -> None:
        for request_id in ticket.ids[taken:]:
            del self._owner[request_id]
            ticket.unfinished -= 1
        if not ticket.accepted.done():
            if error is None:
                ticket.accepted.set_result(None)
            else:
                ticket.accepted.set_exception(error)
        self._tidy(ticket)

    def _brought(self, outputs: list[Output], stats: EngineStats) -> None:
        self._metrics.stats = stats
        for output in outputs:
            ticket, choice = self._owner[output.id]
            if output.finished is not None:
                del self._owner[output.id]
                ticket.unfinished -= 1
            self._metrics.saw(output, ticket.timings[choice])
            if output.finished is FinishReason.CANCELLED:
                self._tidy(ticket)
                continue
            ticket.put(Part(choice, output))
            if ticket.is_full:
                message = f"the answer is read too slowly: {MOST_UNREAD} outputs were waiting"
                ticket.fail(Refusal(503, message))
                self._cancel(ticket)

    def _failed(self, error: Exception) -> None:
        self.failure = error
        for ticket in tuple(self._tickets):
            ticket.unfinished = 0
            ticket.fail(_engine_failed())
            self._tidy(ticket)
        self._owner.clear()

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.unfinished:
            self._thread.order(Cancel(ticket.ids))

    def _tidy(self, ticket: Ticket) -> None:
        if ticket.closed and not ticket.unfinished:
            self._tickets.discard(ticket)
            if not self._tickets:
                self._idle.set()


def _engine_failed() -> Refusal:
    return Refusal(500, "the engine has failed, and the server ends", code="engine_failed")
