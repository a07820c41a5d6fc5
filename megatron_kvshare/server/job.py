"""An HTTP request on its way through the engine, and the form of its answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from megatron_kvshare.server.answer import (
    Choice,
    Piece,
    chat_logprobs,
    completion_logprobs,
    joined,
)
from megatron_kvshare.server.desk import Ticket
from megatron_kvshare.server.refusal import Refusal, as_json
from megatron_kvshare.server.schema import ChatBody, CompletionBody, Prompt
from megatron_kvshare.server.text import Texts
from megatron_kvshare.serving.request import Request, Sampling

_SEEDS = 2**63
_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens``."""


class Form(Protocol):
    """How /v1/completions and /v1/chat/completions show the same things."""

    prefix: str
    kind: str
    chunk_kind: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first choice of a stream, before any text."""
        ...

    def part(self, piece: Piece) -> dict[str, Any]:
        """A choice of a chunk."""
        ...

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A choice of an answer that is not streamed."""
        ...


class Completion:
    """The form of /v1/completions."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def opening(self, index: int) -> None:
        return None

    def whole(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": completion_logprobs(piece.entries, self._texts),
            "finish_reason": piece.finished,
        }

    part = whole


class Chat:
    """The form of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.choice, "delta": delta, **self._rest(piece)}

    def whole(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.choice, "message": message, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        logprobs = chat_logprobs(piece.entries, self._texts)
        return {"logprobs": logprobs, "finish_reason": piece.finished}


class Job:
    """One HTTP request: ``n`` choices for each prompt.

    Choice ``k`` of a prompt is drawn with ``seed + k``, so that the first is what a request for one
    choice would get.
    """

    def __init__(
        self,
        body: CompletionBody | ChatBody,
        prompts: Sequence[tuple[int, ...]],
        texts: Texts,
        model: str,
    ) -> None:
        self._form: Form = Chat(texts) if isinstance(body, ChatBody) else Completion(texts)
        self.id = f"{self._form.prefix}-{uuid.uuid4().hex}"
        self._body, self._model = body, model
        self._created = int(time.time())
        self._prompt_tokens = sum(map(len, prompts))
        self._sampling = sampling_of(body)
        scored = self._sampling[0].logprobs is not None
        echoes: Sequence[Prompt | None] = [None for _ in prompts]
        if isinstance(body, CompletionBody) and body.echo:
            echoes = body.prompt
        self._choices = [
            Choice(index * body.n + k, prompt, texts, echo, scored)
            for index, (prompt, echo) in enumerate(zip(prompts, echoes, strict=True))
            for k in range(body.n)
        ]

    @property
    def requests(self) -> tuple[Request, ...]:
        """What the engine is asked."""
        return tuple(
            Request(
                id=f"{self.id}-{choice.index}",
                prompt=choice.prompt,
                sampling=self._sampling[choice.index % self._body.n],
            )
            for choice in self._choices
        )

    async def whole(self, ticket: Ticket) -> dict[str, Any]:
        """The answer at once.

        Raises:
            Refusal: it has come to nothing.
        """
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for piece in self._pieces(ticket):
            pieces[piece.choice].append(piece)
        choices = [self._with_ids(self._form.whole(p), p, True) for p in map(joined, pieces)]
        return {**self._head(self._form.kind), "choices": choices, "usage": self._usage()}

    async def events(self, ticket: Ticket) -> AsyncIterator[bytes]:
        """The answer as server-sent events; what goes wrong is the last of them."""
        options = self._body.stream_options
        wants_usage = options is not None and options.include_usage
        head = self._head(self._form.chunk_kind)
        usage = {"usage": None} if wants_usage else {}
        begun: set[int] = set()
        try:
            for choice in self._choices:
                opening = self._form.opening(choice.index)
                if opening is not None:
                    yield _event({**head, "choices": [opening], **usage})
            async for piece in self._pieces(ticket):
                if piece.is_empty and not self._body.return_token_ids:
                    continue  # its text is held back until it is certain
                part = self._with_ids(self._form.part(piece), piece, piece.choice not in begun)
                begun.add(piece.choice)
                yield _event({**head, "choices": [part], **usage})
        except Refusal as refusal:
            yield _event(refusal.content())
            return
        if wants_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _pieces(self, ticket: Ticket) -> AsyncIterator[Piece]:
        unfinished = len(self._choices)
        while unfinished:
            part = await ticket.next()
            unfinished -= part.output.finished is not None
            yield self._choices[part.choice].take(part.output)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _with_ids(self, choice: dict[str, Any], piece: Piece, is_first: bool) -> dict[str, Any]:
        """The ids of the prompt come once."""
        if not self._body.return_token_ids:
            return choice
        prompt = {"prompt_token_ids": self._choices[piece.choice].prompt} if is_first else {}
        return {**choice, **prompt, "token_ids": piece.tokens}

    def _usage(self) -> dict[str, int]:
        completion = sum(choice.completion_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
        }


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + as_json(content) + b"\n\n"


def sampling_of(body: CompletionBody | ChatBody) -> tuple[Sampling, ...]:
    """How each of the ``n`` choices is drawn.

    Raises:
        ConfigError: a value is out of range.
    """
    most: int | None
    if isinstance(body, CompletionBody):
        logprobs = body.logprobs
        prompt_logprobs = logprobs if body.echo else None
        most = body.max_tokens if body.max_tokens is not None else _COMPLETION_TOKENS
    else:
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        prompt_logprobs = None
        most = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    return tuple(
        Sampling(
            max_tokens=most,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            seed=None if body.seed is None else _seed(body.seed, k),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for k in range(body.n)
    )


def _seed(first: int, choice: int) -> int:
    """The first is left as it is, so that one out of range is told."""
    return (first + choice) % _SEEDS if choice else first
