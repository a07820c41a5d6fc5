"""Reads raw settings from a command line and from a YAML file; all values are still text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_kvshare.errors import Fault

_FLAG = re.compile(r"--?[A-Za-z]")  # so that -1 and -1e-3 are values
_NULL = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Given:
    """One setting as the user wrote it: ``key`` with underscores, ``where`` for messages.

    ``values`` is None for YAML's null, which stands for "left out".
    """

    key: str
    where: str
    values: tuple[str, ...] | None
    from_file: bool = False


def read_arguments(argv: Sequence[str]) -> tuple[list[Given], list[Fault]]:
    """Cut a command line into flags with their values.

    ``--flag value``, ``--flag=value``, ``--flag v1 v2`` are understood; abbreviations are not.
    """
    found: list[tuple[str, list[str]]] = []
    stray: list[str] = []
    for token in argv:
        if _FLAG.match(token):
            flag, equals, value = token.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(token)
        else:
            stray.append(token)
    faults = [
        Fault("command line", token, "a value without a flag", "write --FLAG VALUE")
        for token in stray
    ]
    return [Given(_key(flag), flag, tuple(values)) for flag, values in found], faults


def read_yaml(path: str) -> tuple[list[Given], list[Fault]]:
    """Read a flat YAML mapping; scalars stay text, so that ``0_1_1`` and ``1e-4`` mean what they
    say."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        rule = f"the file cannot be read: {reason}"
        return [], [Fault("--config", path, rule, "give the path of a YAML file")]
    except yaml.YAMLError as error:
        rule = "the file is not valid YAML: " + " ".join(str(error).split())
        return [], [Fault("--config", path, rule, "write one `key: value` per line")]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        rule = "the file must hold keys with values"
        return [], [Fault("--config", path, rule, "write one `key: value` per line")]
    return _entries(path, root)


def _entries(path: str, root: yaml.MappingNode) -> tuple[list[Given], list[Fault]]:
    found: dict[str, Given] = {}
    faults: list[Fault] = []
    for key_node, node in root.value:
        name = str(key_node.value)
        where = f"{path}:{key_node.start_mark.line + 1}: {name}"
        key = name.replace("-", "_")
        if key in found:
            faults.append(Fault(where, "given twice", "a key stands once in a file", "remove one"))
        if not _is_flat(node):
            rule = "settings are flat: a value is a scalar or a list of scalars"
            faults.append(Fault(where, "nested", rule, "write its keys at the left margin"))
            continue
        found[key] = Given(key, where, _values(node), from_file=True)
    return list(found.values()), faults


def _is_flat(node: yaml.Node) -> bool:
    if isinstance(node, yaml.SequenceNode):
        return all(isinstance(item, yaml.ScalarNode) for item in node.value)
    return isinstance(node, yaml.ScalarNode)


def _values(node: yaml.Node) -> tuple[str, ...] | None:
    if isinstance(node, yaml.SequenceNode):
        return tuple(str(item.value) for item in node.value)
    is_null = node.value in _NULL and getattr(node, "style", None) is None
    return None if is_null else (str(node.value),)


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
