"""What a client is told when it gets no answer, in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from megatron_kvshare.errors import Fault, KVShareError

_MOST_CHARACTERS = 2000
_MOST_FAULTS = 5
RETRY = {"Retry-After": "1"}


class Refusal(HTTPException):
    """An HTTP status and its reason; ``param`` is the key of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @classmethod
    def of(cls, faults: Sequence[Fault]) -> Refusal:
        """A bad request, every fault of it."""
        return cls(400, " ".join(map(str, faults)), param=faults[0].where)

    def content(self) -> dict[str, Any]:
        message = self.detail
        if len(message) > _MOST_CHARACTERS:
            message = message[:_MOST_CHARACTERS] + " ..."
        error = {"message": message, "type": self._kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def _kind(self) -> str:
        if self.status_code == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status_code < 500 else "server_error"

    def response(self) -> JsonResponse:
        return JsonResponse(self.content(), self.status_code, self.headers)


class JsonResponse(Response):
    """ASCII alone, so that whatever a message quotes can be sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return as_json(content)


def as_json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


async def refuse(request: Request, error: Exception) -> Response:
    """The response to anything that an endpoint, or the way to it, has raised."""
    return _refusal(request, error).response()


def _refusal(request: Request, error: Exception) -> Refusal:
    match error:
        case Refusal():
            return error
        case KVShareError():
            return Refusal.of(error.faults)
        case RequestValidationError():
            return _of_body(error)
        case HTTPException(status_code=404 | 405):
            reason = f"there is no {request.method} {request.url.path}: see GET /openapi.json"
            return Refusal(error.status_code, reason, headers=error.headers)
        case HTTPException():
            return Refusal(error.status_code, str(error.detail), headers=error.headers)
    return Refusal(500, "the server has met an error of its own, and its log says which")


def _of_body(error: RequestValidationError) -> Refusal:
    """A body that is no JSON, is not said to be JSON, or does not hold what it should."""
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return Refusal(400, f"the body is no JSON: {reason}")
    if isinstance(first["input"], bytes):
        return Refusal(415, "send the body as JSON, with Content-Type: application/json")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return Refusal(400, "the request has no body: send a JSON object")
    places = [".".join(map(str, each["loc"][1:])) for each in found]
    told = [
        f"{place}: {each['msg']}" if place else str(each["msg"])
        for place, each in zip(places, found, strict=True)
    ]
    return Refusal(400, "; ".join(told[:_MOST_FAULTS]), param=places[0] or None)
