"""What clients may ask for.

A key of OpenAI's interface is one of these: a field of a model below; without effect here
(``ignored``); or known, but taken only with a value that changes nothing (``refused``). A request
with any other key is refused, and so is a value of another type; null is as good as left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_kvshare.serving.request import MOST_LOGPROBS

Prompt = str | tuple[int, ...]
_MOST_NAMED = 5


class Neutral(NamedTuple):
    """Values of a key that change nothing, and why others are refused."""

    values: tuple[Any, ...]
    reason: str


_PENALTY = Neutral((0,), "only repetition_penalty, which divides or multiplies logits")
_TOOLS = "tools are not supported"
_RANKING = {
    "best_of": Neutral((1,), "answers are not ranked; n gives several"),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "logit_bias": Neutral(({},), "logits are not changed token by token"),
}
_ACCOUNTS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


class _Keys(BaseModel):
    """Types are strict: "5" and true are no numbers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    refused: ClassVar[Mapping[str, Neutral]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        faults = list(cls._key_faults(value))
        if faults:
            more = f" (and {len(faults) - _MOST_NAMED} more)" if faults[_MOST_NAMED:] else ""
            text = "; ".join(faults[:_MOST_NAMED]) + more
            raise PydanticCustomError("keys", "{text}", {"text": text})
        return {key: each for key, each in value.items() if each is not None}

    @classmethod
    def _key_faults(cls, value: dict[str, Any]) -> Iterator[str]:
        for key, given in value.items():
            neutral = cls.refused.get(key)
            if neutral is not None and given is not None and not _is_one_of(given, neutral.values):
                yield f"{key} = {given!r:.60} is not supported: {neutral.reason}"
            elif neutral is None and key not in cls.model_fields and key not in cls.ignored:
                yield f"{key!r:.60} is no key of such a request"


def _is_one_of(given: object, values: tuple[Any, ...]) -> bool:
    """Equality in which 0 is 0.0 but not False."""
    return any(
        given == each and isinstance(given, bool) == isinstance(each, bool) for each in values
    )


_Number = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


class StreamOptions(_Keys):
    """``include_usage``: a last chunk says how many tokens there were."""

    ignored = frozenset({"include_obfuscation"})
    include_usage: bool = False


class _Sampled(_Keys):
    """What completions and chats have in common; ranges are judged by ``Sampling``.

    Beyond OpenAI's interface: ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``,
    ``ignore_eos``, and ``return_token_ids`` for the ids of prompt and answer.
    """

    ignored = _ACCOUNTS
    model: str | None = None
    max_tokens: _Number | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: _Number = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] = []
    stop_token_ids: Annotated[list[_Token], Field(max_length=64, fail_fast=True)] = []
    ignore_eos: bool = False
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Sampled:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream", "stream_options needs stream = true")
        return self


class CompletionBody(_Sampled):
    """The body of /v1/completions: one prompt or several, each a text or token ids."""

    refused = {**_RANKING, "suffix": Neutral(("",), "these models write forward only")}
    prompt: list[Prompt]
    echo: bool = False
    logprobs: _Logprobs | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> list[Prompt]:
        if isinstance(value, str):
            return [_text(value)]
        if isinstance(value, list) and value:
            if all(isinstance(each, str) for each in value):
                return [_text(each) for each in value]
            if _are_tokens(value):
                return [tuple(value)]
            if all(isinstance(each, list) and _are_tokens(each) for each in value):
                return [tuple(each) for each in value]
        rule = "a prompt is a text, a list of texts, a list of token ids or a list of such lists"
        raise PydanticCustomError("prompt", rule)


def _are_tokens(value: list[Any]) -> bool:
    return all(type(each) is int for each in value)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        rule = "the text is no Unicode: half of a surrogate pair at character {at}"
        raise PydanticCustomError("prompt", rule, {"at": error.start}) from error
    return value


class TextPart(_Keys):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Keys):
    """One message of a chat."""

    refused = {
        "annotations": Neutral(([],), "messages are text"),
        "audio": Neutral((), "messages are text"),
        "function_call": Neutral((), _TOOLS),
        "refusal": Neutral((), "messages are text"),
        "tool_calls": Neutral(([],), _TOOLS),
    }
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class ChatBody(_Sampled):
    """The body of /v1/chat/completions."""

    refused = {
        **_RANKING,
        "audio": Neutral((), "answers are text"),
        "function_call": Neutral(("none",), _TOOLS),
        "functions": Neutral(([],), _TOOLS),
        "modalities": Neutral((["text"],), "answers are text"),
        "parallel_tool_calls": Neutral((True, False), _TOOLS),
        "prediction": Neutral((), "answers are not compared with a prediction"),
        "reasoning_effort": Neutral(("none",), "there is no reasoning apart from the answer"),
        "response_format": Neutral(({"type": "text"},), "answers are free text"),
        "tool_choice": Neutral(("none", "auto"), _TOOLS),
        "tools": Neutral(([],), _TOOLS),
        "verbosity": Neutral(("medium",), "the length of answers is the model's own"),
        "web_search_options": Neutral((), "there is no search"),
    }
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: _Number | None = None
    logprobs: bool = False
    top_logprobs: _Logprobs | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs = true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise PydanticCustomError(
                "max_tokens", "max_tokens is the earlier name of max_completion_tokens: give one"
            )
        return self
