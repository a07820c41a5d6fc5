"""Reads DeepSpeed's JSON file: an object, as JSON defines it and of sensible size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_kvshare.errors import ConfigError, Fault

_MAX_BYTES = 1 << 20
_TEXT = re.compile(r'"(?:\\.|[^"\\])*"')
_COMMENT = re.compile(r"//|#|/\*")
_TRAILING_COMMA = re.compile(r",\s*[\]}]")


def read_file(path: str) -> dict[str, Any]:
    """What the file says, unchecked.

    Raises:
        ConfigError: it cannot be read, or is not one JSON object whose keys stand there once.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise _wrong(path, f"it is larger than {_MAX_BYTES >> 10} KiB", "give DeepSpeed's JSON")
        text = raw.decode("utf-8")
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except OSError as error:
        rule = f"the file cannot be read: {error.strerror}"
        raise _wrong(path, rule, "give the path of a JSON file") from error
    except UnicodeDecodeError as error:
        raise _wrong(path, "it is not UTF-8 text", "save it as UTF-8") from error
    except json.JSONDecodeError as error:
        rule, fix = _not_json(text, error)
        raise _wrong(path, rule, fix) from error
    except RecursionError as error:
        raise _wrong(path, "its sections are nested too deeply", "write them flat") from error
    except ValueError as error:
        raise _wrong(path, str(error), "write each key once, and numbers as numbers") from error
    if not isinstance(content, dict):
        raise _wrong(path, "it must hold one object", 'write {"zero_optimization": {...}, ...}')
    return content


def _wrong(path: str, rule: str, fix: str) -> ConfigError:
    return ConfigError(Fault("--deepspeed-config", path, rule, fix))


def _not_json(text: str, error: json.JSONDecodeError) -> tuple[str, str]:
    """Rule and fix; DeepSpeed itself takes Hjson, so that some files have worked elsewhere."""
    rule = f"the file is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
    outside = _TEXT.sub('""', text)
    if _COMMENT.search(outside):
        return f"{rule}; comments are not JSON", "remove the comments"
    if _TRAILING_COMMA.search(outside):
        return f"{rule}; after the last entry there is no comma", "remove that comma"
    return rule, 'write "key": value, with a comma between two of them'


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, readers take the one or the other."""
    content = dict(pairs)
    twice = sorted(_repeated([key for key, _ in pairs]))
    if twice:
        raise ValueError(f"the key {', '.join(twice)} is there twice")
    return content


def _repeated(keys: list[str]) -> Iterator[str]:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            yield key
        seen.add(key)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
