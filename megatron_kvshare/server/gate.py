"""What every request passes first: it is counted, has the key, and is no longer than it may be."""

from __future__ import annotations

import asyncio
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_kvshare.server.metrics import Metrics
from megatron_kvshare.server.refusal import Refusal
from megatron_kvshare.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health"})
"""Need no key: who asks whether the server lives learns nothing else."""


class Gate:
    """ASGI middleware; ``paths`` are those that are counted by name."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.responses.labels(path, str(status)).inc()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self._check_key(scope["path"], headers)
            limited = self._limited(headers, receive)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, limited, send)

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._settings.api_key
        if key is None or path in OPEN_PATHS:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        sent = given.encode("latin-1")  # as starlette has decoded it
        if kind.lower() != "bearer" or not secrets.compare_digest(sent, key.encode()):
            raise Refusal(
                401,
                "this server wants its API key, as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """The body as it comes in, as long as it keeps to size and time."""
        most, seconds = self._settings.max_body_bytes, self._settings.stall_seconds
        said = headers.get("content-length", "")
        if said.isdecimal() and int(said) > most:
            raise _too_large(most)
        size, more = 0, True

        async def limited() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout(seconds):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, f"nothing of the body has come for {seconds:g} s") from None
            size += len(message.get("body", b""))
            more = bool(message.get("more_body", False))
            if size > most:
                raise _too_large(most)
            return message

        return limited


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than the {most} bytes that it may have")
