"""Clients of every kind at once, good and bad, and what each of them was told."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tests.integration.serving_process import Served

CLIENTS = 48
KINDS = {"whole": 45, "stream": 20, "left": 10, "left whole": 8, "wrong": 13, "unread": 4}
"""Shares of what clients do, in per cent."""
WRONG: tuple[dict[str, Any], ...] = (
    {"prompt": []},
    {"prompt": [10**9]},
    {"prompt": [5] * 600},
    {"prompt": "x" * 200_000},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x", "best_of": 7},
    {"prompt": "x", "n": 33},
    {"prompt": "x", "stream": True, "max_tokens": "many"},
)
MOST_GROWTH = 0.05
"""Of resident memory, from the second quarter of the requests to the last."""


class Soak:
    """``requests`` by :data:`CLIENTS` clients at a time.

    Greedy answers to one prompt are compared with each other: whatever else was in the batch, and
    whatever was cancelled beside it, everyone gets their own.
    """

    def __init__(self, served: Served, vocabulary: int, requests: int, seed: int = 0) -> None:
        self.served, self.requests = served, requests
        self._draw = random.Random(seed)
        self._vocabulary = vocabulary
        self._prompts = [self._prompt(length) for length in (1, 2, 5, 15, 16, 17, 33, 80, 200)]
        self._answers: dict[tuple[int, ...], list[int]] = {}
        self._to_do = requests
        self.done: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.problems: list[str] = []
        self.memory: list[int] = []
        self.turned_away = 0

    def run(self) -> None:
        asyncio.run(self._run())

    def report(self) -> str:
        """Figures for the log."""
        quarters = [f"{statistics.median(part) / 1e6:.1f}" for part in self._quarters()]
        return f"{dict(self.done)}, {self.turned_away} x 429, resident MB by quarter: {quarters}"

    def check(self) -> None:
        """Everything that must hold."""
        assert not self.problems, self.problems[:5]
        assert self.done.total() == self.requests and set(self.done) == set(KINDS)
        assert set(self.ids.values()) == {1}, "an answer has come twice"
        _, second, _, last = (statistics.median(part) for part in self._quarters())
        assert last <= second * (1 + MOST_GROWTH), self.report()
        assert self.served.metric("kvshare_running") == self.served.metric("kvshare_waiting") == 0
        assert self.served.metric("kvshare_free_pages") == self.served.metric("kvshare_pages")
        assert self.served.metric('kvshare_requests_total{reason="cancelled"}') > 0

    def _quarters(self) -> list[list[int]]:
        size = len(self.memory) // 4
        return [self.memory[size * n : size * (n + 1)] for n in range(4)]

    def _prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(2, self._vocabulary) for _ in range(length))

    async def _run(self) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=8)
        async with httpx2.AsyncClient(
            base_url=self.served.url, timeout=300, limits=limits
        ) as client:
            await asyncio.gather(*(self._client(client) for _ in range(CLIENTS)))
            for _ in range(600):
                if self.served.metric("kvshare_running") == 0:
                    break
                await asyncio.sleep(0.1)

    async def _client(self, client: httpx2.AsyncClient) -> None:
        while self._to_do:
            self._to_do -= 1
            (kind,) = self._draw.choices([*KINDS], [*KINDS.values()])
            work = getattr(self, "_" + kind.replace(" ", "_"))
            try:
                await work(client)
            except Exception as error:
                self.problems.append(f"{kind}: {type(error).__name__}: {error}")
            self.done[kind] += 1
            self.memory.append(self.served.resident_bytes)

    def _asked(self, most: int = 40) -> dict[str, Any]:
        if self._draw.random() < 0.5:
            return {"prompt": self._draw.choice(self._prompts), "max_tokens": 20, **self._greedy()}
        length = self._draw.randrange(1, 250)
        asked = {"prompt": self._prompt(length), "max_tokens": self._draw.randrange(0, most)}
        if self._draw.random() < 0.3:
            asked |= {"echo": True, "logprobs": self._draw.randrange(0, 4)}
        return {**asked, "temperature": self._draw.random() * 9, **self._always()}

    def _always(self) -> dict[str, Any]:
        return {"ignore_eos": True, "return_token_ids": True}

    def _greedy(self) -> dict[str, Any]:
        return {"temperature": 0, **self._always()}

    async def _whole(self, client: httpx2.AsyncClient) -> None:
        asked = self._asked()
        found = (await self._post(client, asked)).json()
        (choice,) = found["choices"]
        self._judge(asked, found["id"], choice["prompt_token_ids"], choice["token_ids"])
        assert choice["finish_reason"] == "length"
        scores = choice["logprobs"]
        wanted = len(asked["prompt"]) + asked["max_tokens"]
        assert scores is None or {len(each) for each in scores.values()} == {wanted}

    async def _stream(self, client: httpx2.AsyncClient) -> None:
        asked = self._asked()
        async with aclosing(self._chunks(client, asked)) as stream:
            chunks = [chunk async for chunk in stream]
        parts = [chunk["choices"][0] for chunk in chunks]
        tokens = [token for part in parts for token in part["token_ids"]]
        (answer_id,) = {chunk["id"] for chunk in chunks}
        self._judge(asked, answer_id, parts[0]["prompt_token_ids"], tokens)
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + ["length"]

    async def _left(self, client: httpx2.AsyncClient) -> None:
        """After some of the answer."""
        asked = {**self._asked(), "max_tokens": 200}
        reads = self._draw.randrange(1, 20)
        async with aclosing(self._chunks(client, asked)) as stream:
            async for _ in stream:
                reads -= 1
                if not reads:
                    return

    async def _left_whole(self, client: httpx2.AsyncClient) -> None:
        """Before the answer comes."""
        asked = {**self._asked(), "max_tokens": 200}
        with_time = httpx2.Timeout(300, read=0.01 + 0.2 * self._draw.random())
        try:
            answer = await client.post("/v1/completions", json=asked, timeout=with_time)
        except httpx2.ReadTimeout:
            return
        assert answer.status_code in (200, 429)

    async def _wrong(self, client: httpx2.AsyncClient) -> None:
        answer = await self._post(client, self._draw.choice(WRONG))
        assert answer.status_code in (400, 413), answer.text
        assert answer.json()["error"]["message"]

    async def _unread(self, client: httpx2.AsyncClient) -> None:
        """A client that asks for much and never reads."""
        where = urlsplit(self.served.url)
        asked = {"prompt": [5] * 100, "max_tokens": 400, "logprobs": 20, "n": 2, "stream": True}
        content = json.dumps({**asked, "ignore_eos": True})
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.socket() as quiet:
            quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            quiet.connect((where.hostname, where.port))
            quiet.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
            await asyncio.sleep(5 * self._draw.random())

    async def _post(self, client: httpx2.AsyncClient, asked: dict[str, Any]) -> httpx2.Response:
        while (answer := await client.post("/v1/completions", json=asked)).status_code == 429:
            await self._later()
        return answer

    async def _later(self) -> None:
        self.turned_away += 1
        await asyncio.sleep(0.1 + 0.4 * self._draw.random())

    async def _chunks(
        self, client: httpx2.AsyncClient, asked: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Of an answer, which ends as it should."""
        body = {**asked, "stream": True}
        status = 429
        while status == 429:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                status = answer.status_code
                last = ""
                async for line in answer.aiter_lines():
                    if status == 200 and line and line != "data: [DONE]":
                        yield json.loads(line.removeprefix("data: "))
                    last = line or last
            if status == 429:
                await self._later()
        assert (status, last) == (200, "data: [DONE]"), last

    def _judge(
        self, asked: dict[str, Any], answer_id: str, prompt: list[int], tokens: list[int]
    ) -> None:
        self.ids[answer_id] += 1
        assert tuple(prompt) == asked["prompt"], "somebody else's answer"
        assert len(tokens) == asked["max_tokens"]
        if asked["temperature"] == 0:
            assert self._answers.setdefault(asked["prompt"], tokens) == tokens
