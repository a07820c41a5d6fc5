"""What the engine brings, as OpenAI's interface shows it: whole answers, and chunks of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_kvshare.server.schema import Prompt
from megatron_kvshare.server.text import Texts
from megatron_kvshare.serving.request import Output, TokenLogprob

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class Entry(NamedTuple):
    """A token, where its text begins, and how likely it was (None: nothing comes before it)."""

    token: int
    offset: int
    logprob: TokenLogprob | None


class Piece(NamedTuple):
    """Some of the text of one choice. ``entries`` where log-probabilities are asked for."""

    choice: int
    text: str
    tokens: tuple[int, ...]
    entries: tuple[Entry, ...] | None
    finished: str | None

    @property
    def is_empty(self) -> bool:
        return not self.text and not self.entries and self.finished is None


class Choice:
    """One of a request's answers while it grows. ``echo``: the prompt as it was sent, where its
    text is asked to come first."""

    def __init__(
        self, index: int, prompt: tuple[int, ...], texts: Texts, echo: Prompt | None, scored: bool
    ) -> None:
        self.index, self.prompt = index, prompt
        self.completion_tokens = 0
        self._texts, self._echo = texts, echo
        self._scored = scored
        self._stream = texts.stream(prompt if echo is None else ())
        self._offset = 0

    def take(self, output: Output) -> Piece:
        """What the next output adds."""
        entries: list[Entry] = []
        text = output.text
        if self._echo is not None:
            entries += self._entries(self.prompt, output.prompt_logprobs or ())
            shown = self._texts.shown(self._echo)
            text, self._offset, self._echo = shown + text, len(shown), None
        entries += self._entries(output.tokens, output.logprobs or ())
        self.completion_tokens += len(output.tokens)
        scored = tuple(entries) if self._scored else None
        return Piece(self.index, text, output.tokens, scored, output.finished)

    def _entries(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> Iterable[Entry]:
        """Offsets are those of the text so far; where a character has several tokens, those of its
        beginning."""
        if not self._scored:
            return
        for token, logprob in zip(tokens, logprobs, strict=True):
            yield Entry(token, self._offset, logprob)
            if self._stream is not None:
                self._offset += len(self._stream.add(token).text)


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    first, last = pieces[0], pieces[-1]
    scored = first.entries is not None
    return Piece(
        first.choice,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(entry for piece in pieces for entry in piece.entries or ()) if scored else None,
        last.finished,
    )


def completion_logprobs(entries: Sequence[Entry] | None, texts: Texts) -> dict[str, Any] | None:
    """The four lists of /v1/completions."""
    if entries is None:
        return None
    return {
        "tokens": [texts.spelling(entry.token) for entry in entries],
        "token_logprobs": [_number(entry.logprob) for entry in entries],
        "top_logprobs": [_top_by_text(entry.logprob, texts) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _top_by_text(logprob: TokenLogprob | None, texts: Texts) -> dict[str, float | None] | None:
    """Two tokens can have one text: the likelier counts."""
    if logprob is None:
        return None
    found: dict[str, float | None] = {}
    for token, value in (*logprob.top, (logprob.token, logprob.logprob)):
        found.setdefault(texts.spelling(token), _finite(value))
    return found


def chat_logprobs(entries: Sequence[Entry] | None, texts: Texts) -> dict[str, Any] | None:
    """The list of /v1/chat/completions."""
    if entries is None:
        return None
    scored = [entry.logprob for entry in entries if entry.logprob is not None]
    content = [
        {
            **_spelled(each.token, each.logprob, texts),
            "top_logprobs": [_spelled(token, value, texts) for token, value in each.top],
        }
        for each in scored
    ]
    return {"content": content, "refusal": None}


def _spelled(token: int, logprob: float, texts: Texts) -> dict[str, Any]:
    """``bytes`` is left open for a part of a character, whose own are not known."""
    text = texts.spelling(token)
    content = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": content}


def _number(logprob: TokenLogprob | None) -> float | None:
    return None if logprob is None else _finite(logprob.logprob)


def _finite(value: float) -> float | None:
    """As JSON can hold it; None for what a broken model makes."""
    return None if math.isnan(value) else max(value, _LEAST)
