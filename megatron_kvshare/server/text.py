"""From texts and messages to token ids, and what single tokens are called."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_kvshare.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from megatron_kvshare.errors import DataError
from megatron_kvshare.server.refusal import Refusal
from megatron_kvshare.server.schema import Message, Prompt
from megatron_kvshare.serving.text import TextStream


class Texts:
    """What a tokenizer gives a server; without one only token ids go in, and no text comes out."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._spellings = [] if tokenizer is None else tokenizer.spellings()
        self._templated, self._no_chat = _templated(tokenizer)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            Refusal: a text, but no tokenizer.
            DataError: a text that the tokenizer cannot read.
        """
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise Refusal(400, "this model has no tokenizer: send token ids", param="prompt")
        return tuple(self._tokenizer.encode(prompt))

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat, up to where the answer begins.

        Raises:
            Refusal: there is no chat template, or it refuses the messages.
        """
        if self._templated is None:
            raise Refusal(400, f"{self._no_chat}: use /v1/completions", param="messages")
        given = [message.for_template() for message in messages]
        return tuple(self._templated.encode(self._templated.chat_text(given)))

    def shown(self, prompt: Prompt) -> str:
        """The text of a prompt that the engine has accepted."""
        if isinstance(prompt, str):
            return prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(prompt)

    def spelling(self, token: int) -> str:
        """A text for a token alone; its number where nothing is known."""
        return self._spellings[token] if token < len(self._spellings) else str(token)

    def stream(self, before: Sequence[int]) -> TextStream | None:
        """The text of what comes after ``before``, token by token."""
        return None if self._tokenizer is None else TextStream(self._tokenizer, before, ())


def _templated(tokenizer: Tokenizer | None) -> tuple[HuggingFaceTokenizer | None, str]:
    """The tokenizer, where it has a chat template; else why there are no chats."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None, "this model's tokenizer has no chat template"
    try:
        has_template = tokenizer.has_chat_template
    except DataError as error:
        return None, f"this model's tokenizer has no chat template that can be read ({error})"
    if not has_template:
        return None, "this model's tokenizer has no chat template"
    return tokenizer, ""
