"""What a dataclass of settings offers to command line, YAML, help and error texts.

One description per field, read from the dataclass: name, type, default and docstring have no
second home.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo

_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
_KINDS = {int: ("N", "a whole number"), float: ("X", "a number"), str: ("TEXT", "text")}


def flag_of(name: str) -> str:
    """How the command line writes the setting of this name."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Setting:
    """One field. ``group`` is the attribute that holds its dataclass; empty for a field of the top
    level."""

    name: str
    group: str
    annotation: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def negative(self) -> str | None:
        """The flag that turns off a switch which is on by default."""
        return "--no-" + self.flag[2:] if self.is_switch and self.default is True else None

    @property
    def is_switch(self) -> bool:
        return self._kind is bool

    @property
    def is_list(self) -> bool:
        return get_origin(self.annotation) is tuple

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self._kind) if get_origin(self._kind) is Literal else ()

    @property
    def metavar(self) -> str:
        """How the value looks in help: empty for a switch."""
        if self.is_switch:
            return ""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        name = _KINDS[self._kind][0]
        return f"{name} [{name} ...]" if self.is_list else name

    @property
    def must_be(self) -> str:
        """What a value must be, to follow the words 'must be'."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.is_switch:
            return "true or false"
        limits = {key: _plain(number) for key, number in self._limits.items()}
        if limits.keys() == {"ge", "le"}:
            return f"{_KINDS[self._kind][1]} from {limits['ge']} to {limits['le']}"
        bounds = [f"{words} {limits[key]}" for key, words in _BOUNDS.items() if key in limits]
        return " ".join([_KINDS[self._kind][1], " and ".join(bounds)]).strip()

    @property
    def example(self) -> str:
        """A command-line piece that works."""
        if self.is_switch:
            return self.flag
        if isinstance(self.default, str | int | float):
            return f"{self.flag} {self.default}"
        if self.choices:
            return f"{self.flag} {self.choices[0]}"
        least = self._limits.get("ge") or 1
        return f"{self.flag} {'TEXT' if self._kind is str else least}"

    @cached_property
    def _parts(self) -> tuple[Any, dict[str, float]]:
        return _unwrap(self.annotation)

    @property
    def _kind(self) -> Any:
        return self._parts[0]

    @property
    def _limits(self) -> dict[str, float]:
        return self._parts[1]


def settings_of(config_type: type[Any]) -> tuple[Setting, ...]:
    """All fields of a configuration and of the dataclasses in it, in the order they are written."""
    found: list[Setting] = []
    for name, hint, field in _fields(config_type):
        if dataclasses.is_dataclass(hint):
            found += [_setting(hint, name, *entry) for entry in _fields(hint)]
        else:
            found.append(_setting(config_type, "", name, hint, field))
    names = [setting.name for setting in found]
    assert len(set(names)) == len(names), "a flag name is used by two groups"
    return tuple(found)


def groups_of(config_type: type[Any]) -> dict[str, type[Any]]:
    """The dataclasses inside a configuration, by attribute."""
    found: dict[str, type[Any]] = {}
    for name, hint, _ in _fields(config_type):
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found[name] = hint
    return found


def _fields(owner: Any) -> list[tuple[str, Any, dataclasses.Field[Any]]]:
    hints = get_type_hints(owner, include_extras=True)
    return [(field.name, hints[field.name], field) for field in dataclasses.fields(owner)]


def _setting(
    owner: Any, group: str, name: str, hint: Any, field: dataclasses.Field[Any]
) -> Setting:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    text = ""
    if is_pydantic_dataclass(owner):
        text = owner.__pydantic_fields__[name].description or ""
    return Setting(name, group, hint, default, " ".join(text.split()))


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _unwrap(annotation: Any) -> tuple[Any, dict[str, float]]:
    """The bare type of ``T | None``, ``Annotated[T, ...]`` and ``tuple[T, ...]``, with numeric
    limits."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _unwrap(next(arg for arg in get_args(annotation) if arg is not type(None)))
    if origin is tuple:
        return _unwrap(get_args(annotation)[0])
    if origin is Annotated:
        base, *extras = get_args(annotation)
        rules = [
            rule for extra in extras if isinstance(extra, FieldInfo) for rule in extra.metadata
        ]
        limits = {
            key: getattr(rule, key) for rule in rules for key in _BOUNDS if hasattr(rule, key)
        }
        return base, limits
    return annotation, {}
