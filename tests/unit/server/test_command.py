"""``kvshare serve``, from its flags to the signal that ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.errors import EXIT_USER_ERROR


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Visitor(threading.Thread):
    """Asks for a long answer, has the signal sent while it comes, and reads it to its end."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._url = f"http://127.0.0.1:{port}"
        self.models: Any = None
        self.last = ""

    def run(self) -> None:
        client = httpx2.Client(base_url=self._url, timeout=60)
        long = {"prompt": "keys", "max_tokens": 200, "ignore_eos": True, "stream": True}
        answer = None
        try:
            self.models = self._first(client).json()["data"]
            request = client.build_request("POST", "/v1/completions", json=long)
            answer = client.send(request, stream=True)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # or the server would go on for ever
        with contextlib.closing(answer):
            self.last = [line for line in answer.iter_lines() if line][-1]

    def _first(self, client: httpx2.Client) -> httpx2.Response:
        for _ in range(1000):
            with contextlib.suppress(httpx2.ConnectError):
                return client.get("/v1/models")
            time.sleep(0.02)
        raise AssertionError("nobody listens")


def test_it_serves_until_a_signal_and_finishes_what_is_open(
    folder: Path, port: int, single, capfd
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    visitor = Visitor(port)
    visitor.start()
    flags = ["--host", "0.0.0.0", "--port", str(port), "--max-batch-size", "2"]
    assert main(["serve", "--hf", str(folder), *flags]) == 0
    visitor.join()
    assert [model["id"] for model in visitor.models] == ["tiny"]
    assert visitor.last == "data: [DONE]"
    assert signal.getsignal(signal.SIGTERM) is before
    told = capfd.readouterr()
    assert f"tiny at http://0.0.0.0:{port}" in told.out
    assert "warning: whoever reaches 0.0.0.0 can use this model" in told.err
    assert "stopping: 1 open" in told.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--load, --hf = None: one model is loaded"),
        (["--hf", "a", "--load", "b"], "give either --load or --hf"),
        (["--hf", "nowhere", "--port", "0"], "nowhere"),
        (["--hf", "a", "--port", "65536"], "--port"),
        (["--hf", "a", "--drain-seconds", "-1"], "--drain-seconds"),
        (["--hf", "a", "--kv-prefill", "sweeps"], "trained, converged, exact"),
        (["--hf", "a", "--cache-gb", "1", "--cache-tokens", "9"], "the cache has one size"),
        (["--hf", "a", "--host", "no.such.host.invalid"], "--host"),
    ],
)
def test_what_cannot_be_served_is_told(flags: list[str], told: str, capsys) -> None:
    assert main(["serve", *flags]) == EXIT_USER_ERROR
    found = capsys.readouterr().err
    assert told in found and "Traceback" not in found
