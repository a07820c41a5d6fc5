"""Reads ``--data-path`` (one prefix, several, or a weighted blend) and ``--split`` (L1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_kvshare.errors import ConfigError, Fault


def parse_blend(flag: str, words: Sequence[str]) -> list[tuple[str, float | None]]:
    """Read Megatron's ``prefix``, ``prefix prefix ...`` or ``weight prefix weight prefix ...``.

    Args:
        flag: name of the flag, for errors.
        words: its values.

    Returns:
        Prefix and weight of each source; the weight is None when none was given.

    Raises:
        ConfigError: weights and prefixes do not alternate, or a weight is not a positive number.
    """
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return [(word, None) for word in words]
    weights, prefixes = numbers[0::2], words[1::2]
    alternate = len(words) % 2 == 0 and all(number is None for number in numbers[1::2])
    if not alternate or any(weight is None or not 0 < weight < math.inf for weight in weights):
        rule = "it is PREFIX, PREFIX PREFIX ... or WEIGHT PREFIX WEIGHT PREFIX ..., weights above 0"
        fix = f"write for example {flag} 0.7 first_prefix 0.3 second_prefix"
        raise ConfigError(Fault(flag, " ".join(words), rule, fix))
    return list(zip(prefixes, weights, strict=True))


def check_split(split: str) -> None:
    """Check ``"969,30,1"``: shares of training, validation and test documents.

    Raises:
        ConfigError: not one to three numbers of at least 0, or nothing left for training.
    """
    shares = [_number(word) for word in split.split(",")]
    valid = all(share is not None and 0 <= share < math.inf for share in shares)
    if not valid or len(shares) > 3 or not shares[0]:
        rule = "it must be one to three numbers of at least 0, the first (training) above 0"
        raise ConfigError(Fault("--split", split, rule, "write for example --split 969,30,1"))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
