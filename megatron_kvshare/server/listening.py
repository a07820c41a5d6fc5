"""The process around the application: its socket, its connections, its signals and its end."""

from __future__ import annotations

import asyncio
import socket
import traceback
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_kvshare.errors import ConfigError, EngineError, Fault, KVShareError
from megatron_kvshare.output import complain, say
from megatron_kvshare.server.app import create_app
from megatron_kvshare.server.settings import ServerSettings
from megatron_kvshare.serving.engine import Engine

_TICK_SECONDS = 0.05
_GRACE_SECONDS = 2
"""For what has been written to reach its client."""
_KEEP_ALIVE_SECONDS = 30


def bound(settings: ServerSettings) -> socket.socket:
    """A socket at the address, which nobody else can then have.

    Raises:
        ConfigError: it cannot be had.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        fix = "give an address of this machine, as 127.0.0.1 or 0.0.0.0"
        raise ConfigError(Fault("--host", host, f"no such address ({error})", fix)) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        rule = f"it cannot be listened at: {error.strerror}"
        fix = "give another; --port 0 takes a free one"
        raise ConfigError(Fault("--host, --port", f"{host}:{port}", rule, fix)) from error
    return listener


class Connection(H11Protocol):
    """One whose client may not leave its answer unread for ever: asyncio would keep both."""

    def __init__(self, *, stall_seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self._stall_seconds = stall_seconds
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def has_unread(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    @property
    def is_busy(self) -> bool:
        """Whether an answer is due, or on its way."""
        return self.has_unread or (self.cycle is not None and not self.cycle.response_complete)

    def pause_writing(self) -> None:
        """More is unread than should be kept."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client goes on reading."""
        self._forget_stall()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_stall()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come; what was answered last may not have been read either."""
        if self.has_unread:
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class Server(uvicorn.Server):
    """Serves an engine, which it owns from its start on. The first signal lets open requests
    finish; a second one lets them go."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        app, self.service = create_app(engine, settings)
        super().__init__(_config(app, settings))
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_until_stopped(self, listener: socket.socket) -> None:
        """Serve, and finish what is open after a signal or :meth:`stop`.

        Raises:
            EngineError: the engine has failed; or the user error that it failed with.
        """
        self.run(sockets=[listener])
        if self.service.desk.failure is not None:
            raise _engine_error(self.service.desk.failure)

    def stop(self) -> None:
        """As a signal does; from any thread."""
        assert self._loop is not None, "it has not begun"
        self._loop.call_soon_threadsafe(self._stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():
            say(f"{self.service.settings.model_name} at {_url(listener)}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would close its door at once, and end by the signal itself afterwards."""
        if self._loop is None:
            self.should_exit = True
        else:
            self.stop()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.service.desk.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets go of clients that do not read: uvicorn would report each as an error of its own."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _GRACE_SECONDS
        while self._busy and loop.time() < deadline:
            await asyncio.sleep(_TICK_SECONDS)
        for connection in self._busy:
            connection.transport.abort()
        await super().shutdown(sockets)

    @property
    def _busy(self) -> list[Connection]:
        found = [each for each in self.server_state.connections if isinstance(each, Connection)]
        return [connection for connection in found if connection.is_busy]

    def _stop(self) -> None:
        desk = self.service.desk
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            desk.give_up("the server has been stopped")

    async def _drain(self) -> None:
        seconds, desk = self.service.settings.drain_seconds, self.service.desk
        complain(f"stopping: {desk.open_choices} open, which may take {seconds:g} s to finish")
        await desk.drain(seconds)
        self.should_exit = True


def _config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=partial(Connection, stall_seconds=settings.stall_seconds),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _engine_error(error: Exception) -> KVShareError:
    """An error of the engine as it is told: its own message, or where it happened."""
    if isinstance(error, KVShareError):
        return error
    last = traceback.extract_tb(error.__traceback__)[-1]
    value = f"{type(error).__name__}: {error}"
    rule = f"it failed in {Path(last.filename).name}, line {last.lineno}, and its requests with it"
    fault = Fault("the engine", value, rule, "start the server again, and report this if it recurs")
    raised = EngineError(fault)
    raised.__cause__ = error
    return raised
