"""From a command line (and a YAML file) to a checked configuration, all faults in one error.

Values enter as text, pydantic turns them into numbers; unknown flags, wrong types, unsupported
Megatron flags and broken rules are collected and raised together.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_kvshare.config.flags.help import help_text
from megatron_kvshare.config.flags.megatron_flags import MegatronFlags, megatron_fault
from megatron_kvshare.config.flags.rule import Rule, broken
from megatron_kvshare.config.flags.settings import Setting, flag_of, groups_of, settings_of
from megatron_kvshare.config.flags.sources import Given, read_arguments, read_yaml
from megatron_kvshare.errors import ConfigError, Fault

C = TypeVar("C")

RENAMED = {
    "kv_forward_passes": "kv_forward_sweeps",
    "kv_backward_passes": "kv_backward_sweeps",
    "kv_min_passes": "kv_min_sweeps",
    "kv_max_passes": "kv_max_sweeps",
}
"""Earlier names of settings and those of today: command lines and files that use them go on
working."""


Completed = Callable[[Any, Mapping[str, str], frozenset[str]], tuple[Any, Sequence[Fault]]]


@dataclass(frozen=True)
class Command:
    """How a subcommand presents itself and what it checks.

    ``prog`` is the name in messages, ``description`` and ``examples`` go into the help; ``rules``
    are run on the configuration; ``megatron`` lists flags that are known without being settings;
    ``completed`` fills in what the settings leave to files that they name, before any rule: it is
    told which settings are given, by name, and where, and which are faulty, and returns the faults
    of those files too.
    """

    prog: str
    description: str = ""
    examples: str = ""
    rules: Sequence[Rule[Any]] = ()
    megatron: MegatronFlags = field(default_factory=dict)
    completed: Completed | None = None


def parse(config_type: type[C], argv: Sequence[str], command: Command) -> C:
    """Build a configuration from a command line.

    The last of repeated flags wins, and the command line wins over ``--config FILE.yaml``.

    Raises:
        ConfigError: with every fault of flags, file, types and rules.
        SystemExit: code 0, after printing the help for ``--help`` or ``-h``.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(config_type, command.prog, command.description, command.examples))
        raise SystemExit(0)
    reader = _Reader(settings_of(config_type), command)
    reader.read(argv)
    config = _build(config_type, reader)
    if config is not None and command.completed is not None and reader.file_was_read:
        config, faults = command.completed(config, reader.given, frozenset(reader.faulty))
        reader.faults += faults
    if config is not None and reader.file_was_read:
        reader.faults += broken(command.rules, config, frozenset(reader.faulty))
    if reader.faults:
        raise ConfigError(list(dict.fromkeys(reader.faults)))
    assert config is not None, "a configuration without faults can be built"
    return config


class _Reader:
    """Collects raw values by setting, and the faults met on the way."""

    def __init__(self, settings: Sequence[Setting], command: Command) -> None:
        self.command = command
        self.settings = {setting.name: setting for setting in settings}
        self.negatives = {
            f"no_{setting.name}": setting for setting in settings if setting.negative is not None
        }
        self.values: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.megatron_faults: dict[str, Fault] = {}
        self.faulty: set[str] = set()
        self.file_was_read = True  # without it most settings are unknown, and no rule can be judged

    def read(self, argv: Sequence[str]) -> None:
        """Read the file first, so that the command line overwrites it."""
        arguments, stray = read_arguments(argv)
        files = [given for given in arguments if given.key == "config"]
        self.faults += stray
        if files and len(files[-1].values or ()) == 1:
            entries, faults = read_yaml((files[-1].values or ("",))[0])
            self.faults += faults
            self.file_was_read = bool(entries) or not faults
            for given in entries:
                self._take(given)
        elif files:
            self.file_was_read = False
            self.faults.append(
                Fault("--config", files[-1].values, "it takes one file", "write --config FILE.yaml")
            )
        for given in arguments:
            if given.key != "config":
                self._take(given)
        self.faults += self.megatron_faults.values()

    @property
    def given(self) -> dict[str, str]:
        """Settings that have a value and are not faulty, and where they are given."""
        return {name: self.where[name] for name in self.values if name not in self.faulty}

    def _take(self, given: Given) -> None:
        setting = self.settings.get(RENAMED.get(given.key, given.key))
        if setting is not None:
            self._set(setting, given, invert=False)
        elif given.key in self.negatives:
            self._set(self.negatives[given.key], given, invert=True)
        elif given.key in self.command.megatron:
            self._megatron(given)
        else:
            self.faults.append(self._unknown(given))

    def _set(self, setting: Setting, given: Given, invert: bool) -> None:
        problem = _shape_problem(setting, given)
        if problem is not None:
            self.faults.append(problem)
            self.faulty.add(setting.name)
            return
        self.faulty.discard(setting.name)
        self.where[setting.name] = given.where
        if given.values is None:
            self.values.pop(setting.name, None)
        elif setting.is_switch:
            self.values[setting.name] = _switch(given, invert)
        else:
            self.values[setting.name] = given.values if setting.is_list else given.values[0]

    def _megatron(self, given: Given) -> None:
        self.megatron_faults.pop(
            given.key, None
        )  # the last of repeated flags is the one that counts
        values = given.values or ()
        if given.from_file and values in (("true",), ("True",)):
            values = ()
        elif given.from_file and (given.values is None or values in (("false",), ("False",))):
            return  # a Megatron feature that is not asked for
        fault = megatron_fault(given.where, self.command.megatron[given.key], values)
        if fault is not None:
            self.megatron_faults[given.key] = fault

    def _unknown(self, given: Given) -> Fault:
        known = ["config", "help", *self.settings, *self.negatives, *self.command.megatron]
        near = difflib.get_close_matches(given.key, known, n=1, cutoff=0.6)
        kind = "key" if given.from_file else "flag"
        hint = f"all {kind}s: {self.command.prog} --help"
        if near:
            name = near[0] if given.from_file else flag_of(near[0])
            hint = f"did you mean {name}? A{hint[1:]}"
        value = " ".join(given.values) if given.values else "given"
        return Fault(given.where, value, f"there is no such {kind}", hint)


def _shape_problem(setting: Setting, given: Given) -> Fault | None:
    """Check the number of values; their types are judged later."""
    count = 1 if given.values is None else len(given.values)
    if setting.is_switch and not given.from_file:
        if count:
            value = " ".join(given.values or ())
            fix = f"write {given.where} alone, or leave it out"
            return Fault(given.where, value, "it is a switch and takes no value", fix)
        return None
    if count == 0 and not (setting.is_list and given.from_file):  # [] in a file is a value
        return Fault(
            given.where, "nothing", "it needs a value", f"write for example {setting.example}"
        )
    if count > 1 and not setting.is_list:
        value = " ".join(given.values or ())
        fix = f"give one value, in quotes when it has spaces; for example {setting.example}"
        return Fault(given.where, value, f"it takes one value, not {count}", fix)
    return None


def _switch(given: Given, invert: bool) -> bool | str:
    if not given.from_file:
        return not invert
    text = (given.values or ("",))[0].lower()
    if not invert:
        return text
    return {"true": "false", "false": "true"}.get(text, text)


def _build(config_type: type[C], reader: _Reader) -> C | None:
    """Build all groups; faulty settings fall back to their defaults so that the rest can be
    judged."""
    groups = groups_of(config_type)
    parts: dict[str, Any] = {}
    for attribute, group_type in groups.items():
        parts[attribute] = _build_part(group_type, attribute, {}, reader)
    if any(part is None for part in parts.values()):
        return None
    built = _build_part(config_type, "", parts, reader)
    return built if isinstance(built, config_type) else None


def _build_part(
    part_type: type[Any], group: str, parts: dict[str, Any], reader: _Reader
) -> Any | None:
    settings = {name: each for name, each in reader.settings.items() if each.group == group}
    values = {name: reader.values[name] for name in settings if name in reader.values}
    try:
        return part_type(**parts, **values)
    except ValidationError as error:
        wrong = {str(detail["loc"][0]) for detail in error.errors()}
    for name in sorted(wrong, key=list(settings).index):
        reader.faulty.add(name)
        reader.faults.append(_type_fault(settings[name], reader))
    kept = {name: value for name, value in values.items() if name not in wrong}
    try:
        return part_type(**parts, **kept)
    except ValidationError:
        return None  # a required setting is among the faulty ones


def _type_fault(setting: Setting, reader: _Reader) -> Fault:
    if setting.name not in reader.values:
        return Fault(
            setting.flag, None, "it is required", f"write {setting.flag} {setting.metavar}"
        )
    value = reader.values[setting.name]
    near = difflib.get_close_matches(str(value), setting.choices, n=1, cutoff=0.4)
    example = f"{setting.flag} {near[0]}" if near else setting.example
    where = reader.where[setting.name]
    return Fault(where, value, f"it must be {setting.must_be}", f"write for example {example}")
