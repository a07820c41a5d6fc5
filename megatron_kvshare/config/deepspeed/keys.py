"""What a key of DeepSpeed's file may be: kinds of values, and what becomes of a key here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
"""What transformers' users write where the program is to fill in the value."""

ALL_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Kind:
    """A kind of values: what they must be, in words, an example, and ``read``: the value as it is
    meant, None for what is none."""

    must_be: str
    example: str
    read: Callable[[Any], Any]


def _whole(value: Any, least: int) -> int | None:
    """1e9 is a whole number too: JSON does not tell them apart, and such files are common."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    is_whole = isinstance(value, int) or value.is_integer()  # not so: Inf
    return int(value) if is_whole and least <= value < 1 << 63 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e300 else None


def _texts(value: Any) -> list[str] | None:
    is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return value if is_list else None


def _pair(value: Any) -> list[float] | None:
    is_pair = isinstance(value, list) and len(value) == 2
    return value if is_pair and all(_number(each) is not None for each in value) else None


def whole(least: int) -> Kind:
    """Whole numbers from ``least`` on."""
    return Kind(f"a whole number of at least {least}", str(least), lambda v: _whole(v, least))


def one_of(*names: str) -> Kind:
    """Some words, as DeepSpeed does not care in which case."""
    known = {name.lower(): name for name in names}
    must_be = f"one of {', '.join(names)}"
    return Kind(
        must_be, f'"{names[0]}"', lambda v: known.get(v.lower()) if isinstance(v, str) else None
    )


DEVICE = Kind(
    "none or cpu: nothing is kept on NVMe disks",
    '"cpu"',
    lambda v: v if v in ("none", "cpu") else None,
)
SWITCH = Kind("true or false", "true", lambda v: v if isinstance(v, bool) else None)
NUMBER = Kind("a number", "1.0", _number)
TEXT = Kind("text", '"text"', lambda v: v if isinstance(v, str) else None)
TEXTS = Kind("a list of texts", '["text"]', _texts)
PAIR = Kind("a list of two numbers", "[0.9, 0.95]", _pair)


@dataclass(frozen=True)
class Passed:
    """Handed to DeepSpeed. ``default``: of a key that is always handed on, for it costs memory or
    time; ``auto``: there is a value to fill in for ``"auto"``; ``stages`` of ZeRO that heed it."""

    kind: Kind
    default: Any = None
    auto: bool = False
    stages: tuple[int, ...] = ALL_STAGES


@dataclass(frozen=True)
class Agreed:
    """Compared with settings of ours, which say it where the file does not."""

    kind: Kind


@dataclass(frozen=True)
class Only:
    """Known, and not handed on: one of ``values`` changes nothing, another is refused."""

    values: tuple[Any, ...]
    rule: str
    fix: str


@dataclass(frozen=True)
class Refused:
    """Refused with every value."""

    rule: str
    fix: str


@dataclass(frozen=True)
class Section:
    """An object of keys. ``stages`` of ZeRO that heed it; ``aliases``: second names of keys."""

    keys: Mapping[str, Entry]
    aliases: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[int, ...] = ALL_STAGES


@dataclass(frozen=True)
class Off:
    """A feature that may be described, while its ``switch`` is off: nothing of it is handed on.
    ``keys``: their names; None: any."""

    keys: frozenset[str] | None
    rule: str
    fix: str
    switch: str = "enabled"


@dataclass(frozen=True)
class Typed:
    """A section with a ``type`` and its ``params``, whose keys depend on the type; ``others``:
    keys beside them. Other types are refused."""

    types: Mapping[str, Section]
    others: Section
    rule: str
    fix: str


Entry = Passed | Agreed | Only | Refused | Section | Off | Typed


def section(**keys: Entry) -> Section:
    """A section that every stage heeds, without second names."""
    return Section(keys)
