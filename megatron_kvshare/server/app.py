"""The application: its paths, and what each of them does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from megatron_kvshare.errors import KVShareError
from megatron_kvshare.server.desk import Desk, Ticket
from megatron_kvshare.server.gate import Gate
from megatron_kvshare.server.job import Job
from megatron_kvshare.server.leaving import ClientLeft, unless_left
from megatron_kvshare.server.metrics import Metrics
from megatron_kvshare.server.refusal import JsonResponse, Refusal, refuse
from megatron_kvshare.server.schema import ChatBody, CompletionBody
from megatron_kvshare.server.settings import ServerSettings
from megatron_kvshare.server.streaming import EventStream
from megatron_kvshare.server.text import Texts
from megatron_kvshare.serving.engine import Engine

T = TypeVar("T")
_LEFT = 499
"""What nginx calls the answer that nobody has waited for; only metrics see it."""


class Service:
    """What the paths do, for one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics(engine.stats())
        self.desk = Desk(engine, settings.max_queue, self.metrics)
        self._texts = Texts(engine.tokenizer)
        self._max_length = engine.max_length
        self._started = int(time.time())

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """``POST /v1/completions``"""
        encoded = _in_thread(lambda: [self._texts.encode(prompt) for prompt in body.prompt])
        return await self._answer(body, len(body.prompt), encoded, request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """``POST /v1/chat/completions``"""
        encoded = _in_thread(lambda: [self._texts.encode_chat(body.messages)])
        return await self._answer(body, 1, encoded, request)

    async def models(self) -> JsonResponse:
        """``GET /v1/models``"""
        return JsonResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> JsonResponse:
        """``GET /v1/models/NAME``"""
        self._check_model(name)
        return JsonResponse(self._model())

    async def health(self) -> JsonResponse:
        """``GET /health``: whether new requests are taken."""
        state = "failed" if self.desk.failure else "stopping" if self.desk.draining else "ok"
        return JsonResponse({"status": state}, 200 if state == "ok" else 503)

    async def show_metrics(self) -> Response:
        """``GET /metrics``"""
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def _answer(
        self,
        body: CompletionBody | ChatBody,
        prompts: int,
        encoded: Callable[[], Awaitable[list[tuple[int, ...]]]],
        request: Request,
    ) -> Response:
        self._check_model(body.model)
        self.desk.check_room(prompts * body.n)

        async def accepted() -> tuple[Job, Ticket]:
            job = Job(body, await encoded(), self._texts, self.settings.model_name)
            return job, await self.desk.open(job.requests)

        try:
            job, ticket = await unless_left(request.receive, accepted())
            if body.stream:
                return EventStream(job.events(ticket), lambda: self.desk.close(ticket))
            try:
                return JsonResponse(await unless_left(request.receive, job.whole(ticket)))
            finally:
                self.desk.close(ticket)
        except ClientLeft:
            return Response(status_code=_LEFT)

    def _check_model(self, name: str | None) -> None:
        served = self.settings.model_name
        if name is not None and name != served:
            reason = f"there is no model {name!r:.200} here: this server has {served!r}"
            raise Refusal(404, reason, param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "megatron_kvshare",
            "max_model_len": self._max_length,
        }


def _in_thread(function: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    """A long text takes a tokenizer a while, and others are served meanwhile."""
    return lambda: asyncio.to_thread(function)


def create_app(engine: Engine, settings: ServerSettings) -> tuple[FastAPI, Service]:
    """The application, which from its start on owns ``engine``."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.desk.start()
        yield
        await service.desk.stop()

    # The pages of documentation that FastAPI brings load scripts from elsewhere.
    app = FastAPI(title="kvshare serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_api_route("/v1/completions", service.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/models/{name:path}", service.model)
    app.add_api_route("/health", service.health)
    app.add_api_route("/metrics", service.show_metrics)
    paths = frozenset(route.path for route in app.routes if isinstance(route, APIRoute))
    app.add_middleware(Gate, settings=settings, metrics=service.metrics, paths=paths)
    for kind in (Refusal, KVShareError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    return app, service
