"""What happens to requests whose client leaves, or does not read, or comes too late; and to all of
them when the server or its engine ends. At a real port, by the real engine."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from megatron_kvshare.errors import ConfigError, EngineError
from megatron_kvshare.server import desk
from megatron_kvshare.server.listening import bound
from megatron_kvshare.server.settings import ServerSettings
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.step import Step
from megatron_kvshare.serving.worker import StepResult
from tests.unit.server.conftest import Live

LONG = {"prompt": [5, 6, 7], "max_tokens": 300, "ignore_eos": True}
SHORT = {"prompt": [8, 9], "max_tokens": 3, "ignore_eos": True}


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.01)


@contextlib.contextmanager
def sent(live: Live, receive_buffer: int | None = None, **body: Any) -> Iterator[socket.socket]:
    """A request by hand, whose answer nobody has begun to read."""
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(live.address)
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield client


def rest(client: socket.socket) -> bytes:
    """What is still to be read of a connection that the server has closed."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while more := client.recv(1 << 16):
            found += more
    return found


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Begin ``work``; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def result() -> Any:
        thread.join(60)
        return results[0]

    return result


def cancelled(live: Live) -> bool:
    """Nothing is open, for the client nor for the engine."""
    stats = live.server.service.metrics.stats
    return live.desk.open_choices == 0 and (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled(live, stream):
    server = live()
    with sent(server, **LONG, stream=stream):
        until(lambda: server.server.service.metrics.stats.generated_tokens > 2)
    until(lambda: cancelled(server))
    assert server.server.service.metrics.stats.generated_tokens < 300
    assert 'reason="cancelled"} 1.0' in httpx2.get(server.url + "/metrics").text
    assert server.post(**SHORT).status_code == 200


def test_one_that_leaves_in_the_queue_is_never_begun(live, new_engine):
    server = live(new_engine(max_batch_size=1))
    with sent(server, **LONG):
        until(lambda: server.server.service.metrics.stats.running == 1)
        with sent(server, prompt=[9] * 50, max_tokens=400):
            until(lambda: server.server.service.metrics.stats.waiting == 1)
        until(lambda: server.desk.open_choices == 1)
        assert server.server.service.metrics.stats.running == 1
    until(lambda: cancelled(server))


FEW = 4096
"""Bytes that the kernel keeps of an answer that is not read; it would keep megabytes."""


def test_a_client_that_does_not_read_is_let_go(live):
    """It holds up nobody while it is there."""
    server = live(send_buffer=FEW, stall_seconds=1.0)
    many = {**LONG, "n": 2, "stream": True, "logprobs": 20}
    with sent(server, receive_buffer=FEW, **many) as client:
        assert client.recv(1)
        start = time.monotonic()
        while server.desk.open_choices:
            assert server.post(**SHORT).status_code == 200
            assert time.monotonic() - start < 30
        until(lambda: cancelled(server))
        assert b"[DONE]" not in rest(client)


def test_what_a_slow_client_has_not_read_does_not_pile_up(live, monkeypatch):
    monkeypatch.setattr(desk, "MOST_UNREAD", 8)
    server = live(send_buffer=FEW, stall_seconds=20.0)
    with sent(server, receive_buffer=FEW, **LONG, stream=True, logprobs=20) as client:
        stats = server.server.service.metrics
        until(lambda: stats.stats.generated_tokens > 2 and stats.stats.running == 0)
        assert stats.stats.generated_tokens < 300
        read = b""
        while b"read too slowly" not in read:
            read = read[-100:] + client.recv(1 << 16)
    until(lambda: cancelled(server))


def test_whole_answers_that_are_not_read_are_let_go(live):
    server = live(send_buffer=FEW, stall_seconds=0.3)
    with sent(server, receive_buffer=FEW, **SHORT | {"max_tokens": 200}, logprobs=20) as client:
        until(lambda: server.server.service.metrics.stats.generated_tokens == 200, 60)
        until(lambda: server.server.server_state.connections == set(), 60)
        assert b"usage" not in rest(client)


class TestLimits:
    def test_a_full_queue_says_come_back(self, live, new_engine):
        server = live(new_engine(max_batch_size=1), max_queue=1)
        with sent(server, **LONG), sent(server, **LONG):
            until(lambda: server.desk.open_choices == 2)
            answer = server.post(**SHORT)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert "come back later" in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "rate_limit_error"
        until(lambda: cancelled(server))
        assert server.post(**SHORT).status_code == 200

    def test_of_a_body(self, live):
        server = live(max_body_bytes=1000)
        long = {**SHORT, "prompt": [5] * 600}
        assert server.post(**long).status_code == 413
        pieces = (piece for piece in [b'{"prompt": "', *[b"x" * 600] * 3, b'"}'])
        kind = {"Content-Type": "application/json"}
        answer = httpx2.post(server.url + "/v1/completions", content=pieces, headers=kind)
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]
        assert server.post(**SHORT).status_code == 200

    def test_of_a_body_that_does_not_come(self, live):
        server = live(stall_seconds=0.2)
        with socket.create_connection(server.address) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")

    def test_the_key(self, live):
        server = live(api_key="sécret")
        ask = {"url": server.url + "/v1/completions", "json": SHORT}
        for wrong in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "sécret".encode()}):
            answer = httpx2.post(**ask, headers=wrong)
            assert answer.status_code == 401 and "Bearer" in answer.json()["error"]["message"]
        right = {"Authorization": "Bearer sécret".encode()}
        assert httpx2.post(**ask, headers=right).status_code == 200
        assert httpx2.get(server.url + "/metrics").status_code == 401
        assert httpx2.get(server.url + "/health").status_code == 200


class TestEnds:
    def test_what_is_open_is_finished(self, live):
        """New requests are refused meanwhile."""
        server = live()
        answer = in_background(lambda: server.post(**LONG, stream=True))
        whole = in_background(lambda: server.post(**LONG))
        until(lambda: server.server.service.metrics.stats.running == 2)
        server.stop()
        until(lambda: server.desk.draining)
        refused = server.post(**SHORT)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert httpx2.get(server.url + "/health").status_code == 503
        assert answer().text.endswith("data: [DONE]\n\n")
        assert whole().json()["usage"]["completion_tokens"] == 300
        server.join()
        assert server.error is None
        with pytest.raises(httpx2.ConnectError):
            server.post(**SHORT)

    def test_not_for_longer_than_there_is_time(self, live):
        server = live(drain_seconds=0.05)
        stream = in_background(lambda: server.post(**LONG, stream=True))
        whole = in_background(lambda: server.post(**LONG))
        until(lambda: server.server.service.metrics.stats.running == 2)
        server.stop()
        assert "0.05 s were not enough" in stream().text.splitlines()[-2]
        assert whole().status_code == 503
        server.join()
        assert server.error is None

    def test_a_second_signal_waits_for_nothing(self, live):
        server = live(drain_seconds=1000)
        stream = in_background(lambda: server.post(**LONG, stream=True))
        until(lambda: server.server.service.metrics.stats.running == 1)
        server.stop()
        server.stop()
        assert "has been stopped" in stream().text
        server.join(20)

    def test_a_client_that_does_not_read_does_not_hold_it_up(self, live):
        server = live(send_buffer=FEW, stall_seconds=1000, drain_seconds=0.05)
        with sent(server, receive_buffer=FEW, **LONG, n=2, stream=True, logprobs=20):
            stats = server.server.service.metrics
            until(lambda: stats.stats.generated_tokens > 200)
            server.stop()
            server.join(20)

    def test_an_error_of_the_engine_is_told_to_all(self, live, new_engine):
        server = live(failing(new_engine()))
        stream = in_background(lambda: server.post(**LONG, stream=True))
        whole = in_background(lambda: server.post(**LONG))
        assert "the engine has failed" in stream().text.splitlines()[-2]
        assert whole().status_code == 500
        assert whole().json()["error"]["code"] == "engine_failed"
        server.join()
        assert isinstance(server.error, EngineError) and server.error.exit_code == 70
        assert "RuntimeError: the device is gone" in str(server.error)


def failing(engine: Engine) -> Engine:
    """One whose device goes away while it has two requests."""
    run = engine.runner.run

    def fails(step: Step) -> StepResult:
        if len(step.tokens) == 2 and step.tokens[0].position > 20:
            raise RuntimeError("the device is gone")
        return run(step)

    engine.runner.run = fails
    return engine


class TestAddress:
    def test_in_use(self, live):
        server = live()
        with pytest.raises(ConfigError, match="--port 0 takes a free one"):
            bound(ServerSettings(model_name="x", port=server.address[1]))

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "300.1.1.1", "a" * 70])
    def test_that_is_none(self, host):
        with pytest.raises(ConfigError, match="no such address"):
            bound(ServerSettings(model_name="x", host=host))
