"""Reads ``--data-path`` (one prefix, several, or a weighted blend) and ``--split``.

What is returned here is what is used: megatron-core's own readers take other spellings of numbers
(``1e2,1`` is 1, 2 and 1 to it) and never see the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megatron_kvshare.errors import ConfigError, Fault

Shares = tuple[float, ...]
"""Shares of training, validation and test documents, as they were given: one to three."""

LEAST_SHARE = 1e-6
"""The order of a blend repeats after a million samples, see ``data/stream.py``."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", re.ASCII)


def parse_blend(flag: str, words: Sequence[str]) -> list[tuple[str, float | None]]:
    """Read Megatron's ``prefix``, ``prefix prefix ...`` or ``weight prefix weight prefix ...``.

    Args:
        flag: name of the flag, for errors.
        words: its values.

    Returns:
        Prefix and weight of each source; the weight is None when none was given.

    Raises:
        ConfigError: weights and prefixes do not alternate, a weight is not a positive number, or it
            is next to nothing beside the others.
    """
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return [(word, None) for word in words]
    prefixes = words[1::2]
    weights = [0.0 if number is None else number for number in numbers[0::2]]
    alternate = len(words) % 2 == 0 and all(number is None for number in numbers[1::2])
    if not alternate or not (min(weights) > 0 and math.isfinite(sum(weights))):
        rule = (
            "it is PREFIX, PREFIX PREFIX ... or WEIGHT PREFIX WEIGHT PREFIX ..., weights above 0"
            " with a finite sum"
        )
        fix = f"write for example {flag} 0.7 first_prefix 0.3 second_prefix"
        raise ConfigError(Fault(flag, " ".join(words), rule, fix))
    least = min(weights)
    if least / sum(weights) < LEAST_SHARE:
        rule = f"{prefixes[weights.index(least)]} has so little weight that nothing of it is read"
        fix = f"give every source at least {LEAST_SHARE:g} of the sum of the weights, or drop it"
        raise ConfigError(Fault(flag, " ".join(words), rule, fix))
    return list(zip(prefixes, weights, strict=True))


def parse_split(split: str) -> Shares:
    """Read ``"969,30,1"``: shares of training, validation and test documents.

    Raises:
        ConfigError: not one to three numbers of at least 0 with a finite sum, or nothing left for
            training.
    """
    numbers = [_number(word.strip()) for word in split.split(",")]
    shares = tuple(-1.0 if number is None else number for number in numbers)
    valid = all(share >= 0 for share in shares) and math.isfinite(sum(shares))
    if not valid or len(shares) > 3 or not shares[0]:
        rule = "it must be one to three numbers of at least 0, the first (training) above 0"
        raise ConfigError(Fault("--split", split, rule, "write for example --split 969,30,1"))
    return shares


def _number(word: str) -> float | None:
    """A decimal number of ASCII digits; anything else is the name of a file."""
    return float(word) if _NUMBER.fullmatch(word) else None
