"""A rule about several settings, and how rules are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_kvshare.errors import Fault

C = TypeVar("C", contravariant=True)


@dataclass(frozen=True)
class Rule(Generic[C]):
    """``check`` yields the faults of a configuration.

    It is skipped when a setting it ``reads`` is itself faulty, so that one slip is reported once
    and hides nothing else.
    """

    check: Callable[[C], Iterable[Fault]]
    reads: frozenset[str]


def rule(reads: str) -> Callable[[Callable[[C], Iterable[Fault]]], Rule[C]]:
    """Make a rule of a function; ``reads`` names the settings it looks at, separated by spaces."""
    return lambda check: Rule(check, frozenset(reads.split()))


def broken(rules: Sequence[Rule[Any]], config: object, faulty: frozenset[str]) -> Iterator[Fault]:
    """The faults of all rules that can be judged."""
    for each in rules:
        if not each.reads & faulty:
            yield from each.check(config)


def multiples(value: int, step: int) -> str:
    """The multiples of ``step`` next to ``value``, for a fix: ``"96 or 128"``."""
    below, above = value // step * step, -(-value // step) * step
    return f"{below} or {above}" if 0 < below < above else str(above)


def divisor(value: int, limit: int) -> int:
    """The largest divisor of ``value`` that is at most ``limit``."""
    return max(each for each in range(1, min(value, limit) + 1) if value % each == 0)
