"""How an engine is set up (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_kvshare.errors import ConfigError, Fault

PrefillMode = Literal["trained", "converged", "exact"]

FieldRule = tuple[str, bool, str, str]
"""A field, whether it is as it must be, how that is, and the way out."""


def check(
    settings: object, rules: Sequence[FieldRule], shown: Callable[[str], str] = lambda name: name
) -> None:
    """Raise :class:`ConfigError` with every field that is not as it must be; ``shown``: what the
    user calls it."""
    faults = [
        Fault(shown(name), getattr(settings, name), rule, fix)
        for name, holds, rule, fix in rules
        if not holds
    ]
    if faults:
        raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """``kv_prefill``: how keys and values of a prompt are made where layers read above themselves:
    ``trained`` as in training, ``converged`` by two sweeps over eight subsets, ``exact`` until
    nothing moves, as decoding makes them. Maps without such layers know no difference.

    The cache has ``cache_tokens``, or takes ``cache_gb`` (1e9 bytes, of one rank); left out: enough
    for ``max_batch_size`` sequences of ``max_length``, on a GPU most of what is free.
    ``prefill_tokens``: a step works on about so many tokens of prompts beside its decoding.
    """

    page_size: int = 128
    cache_gb: float | None = None
    cache_tokens: int | None = None
    max_batch_size: int = 16
    max_length: int | None = None
    prefill_tokens: int = 2048
    kv_prefill: PrefillMode = "trained"
    prefix_reuse: bool = True
    bf16: bool = False
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        check(self, self._rules(), lambda name: f"--{name.replace('_', '-')}")

    def _rules(self) -> list[FieldRule]:
        one = self.cache_gb is None or self.cache_tokens is None
        return [
            ("page_size", 1 <= self.page_size <= 65536, "tokens of a page", "use 128"),
            ("cache_gb", one, "the cache has one size", "give --cache-gb or --cache-tokens"),
            ("cache_gb", _positive(self.cache_gb), "1e9 bytes", "use a positive number"),
            ("cache_tokens", _positive(self.cache_tokens), "tokens", "use a positive number"),
            ("max_batch_size", self.max_batch_size >= 1, "sequences at a time", "use 1 or more"),
            ("max_length", _positive(self.max_length), "prompt and new tokens", "use 1 or more"),
            ("prefill_tokens", self.prefill_tokens >= 1, "tokens of a step", "use 512 or more"),
        ]


def _positive(value: float | None) -> bool:
    return value is None or value > 0
