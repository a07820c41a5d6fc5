"""What is asked of the engine, and what it answers (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from megatron_kvshare.serving.settings import FieldRule, check

_MOST_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why a request has ended, in the words of OpenAI's API."""

    STOP = "stop"  # the end-of-document token, a stop token or a stop string
    LENGTH = "length"  # as many tokens as were asked for, or as the model or the cache can hold
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest; ``top_k`` 0, ``top_p`` 1 and
    ``min_p`` 0 restrict nothing.

    ``max_tokens`` None: as many as there is room for. ``seed`` None: one is drawn; the noise of a
    token is a function of seed and position alone, whatever else is in the batch. ``logprobs``: so
    many alternatives for each new token (0: of the token alone; None: none at all);
    ``prompt_logprobs`` likewise for the tokens of the prompt.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        check(self, self._rules())

    def _rules(self) -> list[FieldRule]:
        most = MOST_LOGPROBS
        return [
            ("max_tokens", _at_least(self.max_tokens, 0), "a number of tokens", "use 0 or more"),
            (
                "temperature",
                0 <= self.temperature <= 100,
                "from 0 (the likeliest token) to 100",
                "use 0 for greedy decoding, 1 for the model's own distribution",
            ),
            ("top_k", self.top_k >= 0, "a number of tokens", "use 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "a probability above 0", "use 1 for all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "a share of the likeliest's", "use 0 for all tokens"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty <= 100,
                "a positive factor, at most 100",
                "use 1 for none",
            ),
            ("stop", "" not in self.stop, "an empty string stops nothing", "leave it out"),
            (
                "seed",
                self.seed is None or 0 <= self.seed <= _MOST_SEED,
                f"a whole number from 0 to {_MOST_SEED}",
                "leave it out for a random one",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= most,
                f"at most {most} alternatives",
                f"use 0 to {most}",
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= most,
                f"at most {most} alternatives",
                f"use 0 to {most}",
            ),
        ]


MOST_LOGPROBS = 20


def _at_least(value: int | None, least: int) -> bool:
    return value is None or value >= least


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt of token ids, under an ``id`` that no other request of the engine has."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)


class TokenLogprob(NamedTuple):
    """``top``: the likeliest tokens and their log-probabilities, best first; all of the model's own
    distribution, before temperature, penalties and cuts."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """What a step has brought for one request.

    ``text`` is what can be shown: characters that more tokens, or a stop string, may still change
    are held back. ``prompt_logprobs``: with the first output, where asked for; its first entry is
    None, because nothing comes before the first token. ``finished`` is set once, in the last one.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finished: FinishReason | None = None
