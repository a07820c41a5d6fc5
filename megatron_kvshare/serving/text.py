"""From tokens to text while it grows: whole characters only, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_kvshare.data.tokenizers import Tokenizer

_BROKEN = "\ufffd"
_CONTEXT = 8
"""Tokens decoded again with new ones: a token's text can depend on those before it."""


class Piece(NamedTuple):
    """``text`` can be shown; ``stopped``: a stop string has been met, and cut off."""

    text: str
    stopped: bool


class TextStream:
    """The text of one request."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = list(prompt[-_CONTEXT:])
        self._shown = len(self._tokens)
        self._first = 0
        self._held = ""

    def add(self, token: int, is_last: bool = False) -> Piece:
        """One more token; ``is_last``: nothing more will come, so nothing is held back."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._first : self._shown])
        after = self._tokenizer.decode(self._tokens[self._first :])
        if after.endswith(_BROKEN) and not is_last:
            return Piece("", False)  # a character whose other bytes are yet to come
        self._first, self._shown = max(0, self._shown - _CONTEXT), len(self._tokens)
        self._held += after[len(before) :]
        return self._take(is_last)

    def finish(self) -> str:
        """What was held back."""
        before = self._tokenizer.decode(self._tokens[self._first : self._shown])
        after = self._tokenizer.decode(self._tokens[self._first :])
        text, self._held = self._held + after[len(before) :], ""
        return text

    def _take(self, is_last: bool) -> Piece:
        found = [self._held.find(stop) for stop in self._stop]
        hits = [place for place in found if place >= 0]
        if hits:
            text, self._held = self._held[: min(hits)], ""
            return Piece(text, True)
        kept = 0 if is_last else max(map(self._begun, self._stop), default=0)
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return Piece(text, False)

    def _begun(self, stop: str) -> int:
        """How many of the last characters may be the beginning of ``stop``."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
