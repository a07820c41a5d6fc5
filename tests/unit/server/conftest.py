"""One tiny model, served in this process: by a test client, or at a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from megatron_kvshare.server.app import Service, create_app
from megatron_kvshare.server.listening import Server, bound
from megatron_kvshare.server.settings import ServerSettings
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.load import open_model, start_engine
from megatron_kvshare.serving.settings import EngineSettings
from tests.served import SMALL, write_served

LONG = SMALL.but(extra={"seq_length": 512})
MODEL = "tiny"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("served") / MODEL, tiny=LONG)


@pytest.fixture(scope="session")
def new_engine(folder: Path, single) -> Callable[..., Engine]:
    """Decoding and prompts are computed exactly, so that both can be compared with one model."""

    def made(**settings: Any) -> Engine:
        chosen = {"page_size": 8, "kv_prefill": "exact", "max_batch_size": 4, **settings}
        engine = start_engine(open_model(folder), EngineSettings(**chosen), single)
        assert engine is not None
        return engine

    return made


@pytest.fixture(scope="session")
def served(new_engine) -> Iterator[tuple[TestClient, Service]]:
    """Without a network; an error of the server's own is raised in the test."""
    app, service = create_app(new_engine(), ServerSettings(model_name=MODEL, max_queue=8))
    with TestClient(app) as client:
        yield client, service


@pytest.fixture
def client(served) -> Iterator[TestClient]:
    """Whatever a test does, nothing stays open."""
    client, service = served
    yield client
    assert service.desk.open_choices == 0


class Live:
    """A server in a thread. ``ended`` with the error that it has ended with."""

    def __init__(self, engine: Engine, settings: ServerSettings, send_buffer: int | None) -> None:
        self.engine = engine
        self.server = Server(engine, settings)
        self.desk = self.server.service.desk
        listener = bound(settings)
        if send_buffer is not None:  # connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.address = listener.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(listener,))
        self._thread.start()
        while not self.server.started:
            self._thread.join(0.01)

    def _run(self, listener: socket.socket) -> None:
        try:
            self.server.serve_until_stopped(listener)
        except Exception as error:
            self.error = error

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=60)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.server.stop()

    def join(self, seconds: float = 30) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "it has not ended"


@pytest.fixture
def live(new_engine) -> Iterator[Callable[..., Live]]:
    """Start servers that end with the test."""
    started: list[Live] = []

    def start(
        engine: Engine | None = None, send_buffer: int | None = None, **settings: Any
    ) -> Live:
        chosen = ServerSettings(**{"model_name": MODEL, "port": 0, "drain_seconds": 20, **settings})
        started.append(Live(engine or new_engine(), chosen, send_buffer))
        return started[-1]

    yield start
    for each in started:
        with contextlib.suppress(RuntimeError):
            each.stop()
        each.join()
