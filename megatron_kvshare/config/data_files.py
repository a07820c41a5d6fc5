"""Reads the files that data flags name: long blends, and blends that a run changes to on its way.

What these functions return is what is checked and used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_kvshare.config.blend import parse_blend
from megatron_kvshare.config.fields.data import DataConfig
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.errors import ConfigError, Fault

PARTS = ("train", "valid", "test")
"""What Megatron calls the parts of the data, also in the keys of its file."""

_STAGES_EXAMPLE = "write for example `- {from-step: 8001, data-path: [0.7, web, 0.3, math]}`"
_STARTS = ("from-step", "from-tokens")


def with_paths_of_files(
    data: DataConfig, given: Mapping[str, str]
) -> tuple[DataConfig, list[Fault]]:
    """``data`` with the paths that ``--data-args-path`` and ``--per-split-data-args-path`` hold.

    Args:
        data: data settings.
        given: names of the settings that were given.
    """
    faults: list[Fault] = []
    paths: dict[str, Any] = {}
    try:
        if data.data_args_path is not None:
            _only("--data-args-path", data.data_args_path, ["data_path"], given)
            paths["data_path"] = _words_of(data.data_args_path)
    except ConfigError as error:
        faults += error.faults
    try:
        if data.per_split_data_args_path is not None:
            names = [f"{part}_data_path" for part in PARTS]
            _only("--per-split-data-args-path", data.per_split_data_args_path, names, given)
            paths |= _words_per_part(data.per_split_data_args_path)
    except ConfigError as error:
        faults += error.faults
    return replace(data, **paths), faults


def _only(flag: str, file: str, names: Sequence[str], given: Mapping[str, str]) -> None:
    both = [flag_of(name) for name in names if name in given]
    if both:
        fix = f"give one of them; the file can hold what {both[0]} says"
        raise ConfigError(Fault(flag, file, f"it excludes {', '.join(both)}", fix))


def _words_of(file: str) -> tuple[str, ...]:
    flag = "--data-args-path"
    words = tuple(_text(flag, file).split())
    if not words:
        raise ConfigError(Fault(flag, file, "the file is empty", "write the blend into it"))
    return words


def _words_per_part(file: str) -> dict[str, tuple[str, ...]]:
    """By setting, what a JSON object has under ``train``, ``valid`` and ``test``: words, or one
    text of them."""
    flag = "--per-split-data-args-path"
    fix = 'write for example {"train": [0.7, "web", 0.3, "books"], "valid": ["held_out"]}'
    try:
        values = json.loads(_text(flag, file))
    except ValueError as error:
        raise ConfigError(Fault(flag, file, f"it is not JSON ({error})", fix)) from error
    if not isinstance(values, dict) or not values.keys() <= set(PARTS):
        rule = "it must be a JSON object with the keys train, valid and test, and no others"
        raise ConfigError(Fault(flag, file, rule, fix))
    found = {}
    for part, value in values.items():
        words = value.split() if isinstance(value, str) else [] if value is None else value
        plain = isinstance(words, list) and all(
            isinstance(word, str | int | float) and not isinstance(word, bool) for word in words
        )
        if not plain:
            rule = f"{part} must be a list of prefixes, each with a weight before it or none"
            raise ConfigError(Fault(flag, file, rule, fix))
        found[f"{part}_data_path"] = tuple(map(str, words))
    if not any(found.values()):
        raise ConfigError(Fault(flag, file, "it names no data", fix))
    return found


@dataclass(frozen=True)
class DataStage:
    """A blend, ``words`` as those of ``--data-path``, that a run reads from a place on: from
    ``step``, counted from 1 as in the log, or from ``tokens``. ``where``: file, line and key."""

    where: str
    words: tuple[str, ...]
    step: int | None = None
    tokens: int | None = None

    def first_sample(self, global_batch_size: int, seq_length: int) -> int:
        """The first of the run's samples, from 0, that are of this stage: the first one of the
        step, or the first that begins when so many tokens have been read."""
        if self.step is not None:
            return (self.step - 1) * global_batch_size
        return -(-(self.tokens or 0) // seq_length)

    @property
    def start(self) -> str:
        """Where it begins, as the file says it."""
        if self.step is not None:
            return f"from-step {self.step:,}"
        return f"from-tokens {self.tokens or 0:,}"


def read_stages(data: DataConfig) -> tuple[DataStage, ...]:
    """The stages of ``--data-stages``, in the order of the file; none without the flag.

    Raises:
        ConfigError: with every fault of the file.
    """
    if data.data_stages is None:
        return ()
    flag, file = "--data-stages", data.data_stages
    try:
        root = yaml.compose(_text(flag, file), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        rule = "the file is not valid YAML: " + " ".join(str(error).split())
        raise ConfigError(Fault(flag, file, rule, _STAGES_EXAMPLE)) from error
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        rule = "it must be a list of stages, each with where it begins and its data"
        raise ConfigError(Fault(flag, file, rule, _STAGES_EXAMPLE))
    stages: list[DataStage] = []
    faults: list[Fault] = []
    for node in root.value:
        try:
            stages.append(_stage(f"{file}:{node.start_mark.line + 1}", node))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return tuple(stages)


def order_faults(
    stages: Sequence[DataStage], global_batch_size: int, seq_length: int
) -> Iterator[Fault]:
    """Stages follow one another, and the first one the run's own data."""
    before = 0
    for stage in stages:
        first = stage.first_sample(global_batch_size, seq_length)
        if first <= before:
            rule = (
                f"it begins with sample {first:,}, at or before the data ahead of it"
                f" (sample {before:,})"
            )
            fix = "write the stages in their order; the run begins with --data-path"
            yield Fault(stage.where, stage.start, rule, fix)
        before = max(first, before)


def _stage(where: str, node: yaml.Node) -> DataStage:
    """One item of the list."""
    scalars = isinstance(node, yaml.MappingNode) and all(
        isinstance(key, yaml.ScalarNode) for key, _ in node.value
    )
    if not scalars:
        raise ConfigError(Fault(where, "no mapping", "a stage has keys", _STAGES_EXAMPLE))
    entries = [(str(key.value).replace("_", "-"), value) for key, value in node.value]
    keys = [key for key, _ in entries]
    starts = [key for key in keys if key in _STARTS]
    if len(starts) != 1 or sorted(keys) != sorted([*starts, "data-path"]):
        rule = f"a stage has the key data-path and one of {' and '.join(_STARTS)}"
        raise ConfigError(Fault(where, ", ".join(keys) or "nothing", rule, _STAGES_EXAMPLE))
    values = dict(entries)
    words = _words(f"{where}: data-path", values["data-path"])
    parse_blend(f"{where}: data-path", words)
    number = _whole(f"{where}: {starts[0]}", values[starts[0]])
    if starts[0] == "from-step":
        return DataStage(where, words, step=number)
    return DataStage(where, words, tokens=number)


def _words(where: str, node: yaml.Node) -> tuple[str, ...]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    words = tuple(str(item.value) for item in items if isinstance(item, yaml.ScalarNode))
    if not words or len(words) != len(items) or not all(words):
        rule = "it is a prefix, or a list of prefixes, each with a weight before it or none"
        raise ConfigError(Fault(where, "something else", rule, _STAGES_EXAMPLE))
    return words


def _whole(where: str, node: yaml.Node) -> int:
    """A whole number above 0, also written as 2e9."""
    text = str(node.value) if isinstance(node, yaml.ScalarNode) else "something else"
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        number = math.nan
    if not (0 < number < 1 << 53 and number.is_integer()):
        rule = "it must be a whole number above 0"
        raise ConfigError(Fault(where, text, rule, "write for example 8001 or 2e9"))
    return int(number)


def _text(flag: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        rule = f"the file cannot be read: {reason}"
        raise ConfigError(Fault(flag, file, rule, "give the path of a text file")) from error
