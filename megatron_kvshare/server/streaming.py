"""An answer that is sent while it grows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_kvshare.server.leaving import ClientLeft, unless_left


class EventStream(Response):
    """Server-sent events. ``done`` is called at the end, also where the client leaves before."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], done: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events, self._done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_left(receive, self._send_all(send))
        except ClientLeft:
            pass
        finally:
            self._done()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
