"""Checks DeepSpeed's file key by key, by the table."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_kvshare.config.deepspeed.keys import (
    AUTO,
    TEXT,
    Agreed,
    Entry,
    Kind,
    Off,
    Only,
    Passed,
    Refused,
    Section,
    Typed,
    one_of,
)
from megatron_kvshare.config.deepspeed.table import TOP
from megatron_kvshare.errors import Fault

_SHOWN = 60
"""Characters of a value in a message."""


@dataclass
class Checked:
    """``passed`` and ``agreed``: values that are right, by keys with their sections, as in
    ``zero_optimization.stage``; ``"auto"`` where the program is to fill them in. ``keys``: all that
    the table knows."""

    path: str
    keys: set[str] = field(default_factory=set)
    passed: dict[str, Any] = field(default_factory=dict)
    agreed: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def where(self, key: str) -> str:
        """A key in messages, at most as long as a reader can take."""
        return f"{self.path}: {textwrap.shorten(key, 2 * _SHOWN)}"


def check(path: str, content: Mapping[str, Any], stage: int | None) -> Checked:
    """``stage``: of ZeRO, which does not heed the keys of others; None: it is not known."""
    checked = Checked(path)
    _Checker(checked, stage).section(TOP, content, "")
    return checked


class _Checker:
    """Collects values and faults of one file."""

    def __init__(self, checked: Checked, stage: int | None) -> None:
        self.checked, self.stage = checked, stage

    def section(self, entry: Section, content: Mapping[str, Any], prefix: str) -> None:
        given: dict[str, str] = {}
        for written, value in content.items():
            name = entry.aliases.get(written, written)
            if name not in entry.keys:
                self._fault(prefix + written, value, *_unknown(written, prefix, entry))
            elif name in given:
                rule = f"it is another name of {given[name]}, which is given too"
                self._fault(prefix + written, value, rule, "give one of them")
            else:
                given[name] = written
                self.checked.keys.add(prefix + name)
                self._entry(entry.keys[name], prefix + name, value)

    def _entry(self, entry: Entry, key: str, value: Any) -> None:
        match entry:
            case Section():
                self._inside(entry, key, value)
            case Typed():
                self._typed(entry, key, value)
            case Off():
                self._off(entry, key, value)
            case Refused():
                self._fault(key, value, entry.rule, entry.fix)
            case Only():
                if value != AUTO and not any(_same(value, each) for each in entry.values):
                    self._fault(key, value, entry.rule, entry.fix)
            case Agreed():
                self._take(self.checked.agreed, entry.kind, key, value, auto=True)
            case Passed():
                self._passed(entry, key, value)

    def _passed(self, entry: Passed, key: str, value: Any) -> None:
        if self._take(self.checked.passed, entry.kind, key, value, entry.auto):
            self._heeded(entry.stages, key, value, harmless=entry.default)

    def _inside(self, entry: Section, key: str, value: Any) -> None:
        if key == "zero_optimization" and isinstance(value, bool):
            rule, fix = "it is a section of its own now", 'write {"stage": 1}'
            self._fault(key, value, rule, fix)
        elif not isinstance(value, dict):
            self._fault(key, value, "it must be a section", f'write "{key}": {{...}}')
        elif value.get("device") == "none" or self._heeded(entry.stages, key, value):
            self.section(entry, value, f"{key}.")

    def _typed(self, entry: Typed, key: str, value: Any) -> None:
        """The keys of another type are not looked at: it is refused as a whole."""
        if not isinstance(value, dict):
            self._fault(key, value, "it must be a section", f'write "{key}": {{"type": ...}}')
            return
        written, place = value.get("type"), f"{key}.type"
        name = one_of(*entry.types).read(written)
        if written is None:
            rule, names = "without a type DeepSpeed does not heed the section", list(entry.types)
            self._fault(place, written, rule, f'write for example "type": "{names[0]}"')
        elif name is None:
            self._fault(place, written, *_other_type(written, entry))
        else:
            self.checked.agreed[place] = name
            keys = {"type": Passed(TEXT), "params": entry.types[name], **entry.others.keys}
            self.section(Section(keys), {**value, "type": name}, f"{key}.")
            self.checked.passed.pop(place)

    def _off(self, entry: Off, key: str, value: Any) -> None:
        if not isinstance(value, dict):
            self._fault(key, value, "it must be a section", f'write "{key}": {{...}}')
            return
        switch = value.get(entry.switch, False)
        if switch is not False and switch != AUTO:
            self._fault(f"{key}.{entry.switch}", switch, entry.rule, entry.fix)
        for name in value:
            if entry.keys is not None and name not in entry.keys:
                rule, fix = _unknown(name, f"{key}.", entry)
                self._fault(f"{key}.{name}", value[name], rule, fix)

    def _take(self, to: dict[str, Any], kind: Kind, key: str, value: Any, auto: bool) -> bool:
        read = value if auto and value == AUTO else kind.read(value)
        if read is None:
            rule = f"it must be {kind.must_be}"
            if value == AUTO:
                rule = "there is no value to fill in for auto"
            name = key.rpartition(".")[2]
            self._fault(key, value, rule, f'write for example "{name}": {kind.example}')
            return False
        to[key] = read
        return True

    def _heeded(self, stages: tuple[int, ...], key: str, value: Any, harmless: Any = None) -> bool:
        if self.stage is None or self.stage in stages or value == AUTO:
            return True
        self.checked.passed.pop(key, None)
        if harmless is not None and _same(value, harmless):
            return True
        rule = f"DeepSpeed does not heed it at ZeRO stage {self.stage}"
        nearest = min(stages, key=lambda each: abs(each - (self.stage or 0)))
        self._fault(key, value, rule, f"remove it, or use stage {nearest}")
        return False

    def _fault(self, key: str, value: Any, rule: str, fix: str) -> None:
        self.checked.faults.append(Fault(self.checked.where(key), shown(value), rule, fix))


def shown(value: Any) -> Any:
    """A value of the file in a message: what has parts as a few words of JSON."""
    if not isinstance(value, dict | list | str):
        return value
    return textwrap.shorten(value if isinstance(value, str) else json.dumps(value), _SHOWN)


def _same(value: Any, other: Any) -> bool:
    """As JSON: ``true`` is not 1, while 1.0 is."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _other_type(written: Any, entry: Typed) -> tuple[str, str]:
    """Rule and fix."""
    near = difflib.get_close_matches(str(written), entry.types, n=1, cutoff=0.8)
    return entry.rule, f'write "{near[0]}"' if near else entry.fix


def _unknown(name: str, prefix: str, entry: Section | Off) -> tuple[str, str]:
    """Rule and fix for a key that is not in its section."""
    rule = "DeepSpeed knows no such key here"
    sections = sorted({found for found in _sections_of(TOP, name, "") if found != prefix})
    if sections:
        place = sections[0].rstrip(".") or "the top of the file"
        return rule, f"move it to {place}"
    keys = [*(entry.keys or ()), *(entry.aliases if isinstance(entry, Section) else ())]
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    return rule, f"did you mean {near[0]}? Else remove it" if near else "remove it"


def _sections_of(entry: Section, name: str, prefix: str) -> Iterator[str]:
    """Where a key of this name stands."""
    if name in entry.keys:
        yield prefix
    for key, inner in entry.keys.items():
        if isinstance(inner, Section):
            yield from _sections_of(inner, name, f"{prefix}{key}.")
