"""Damaged copies of files, the same in every run: what a reader must refuse, or read as before.

``mutations`` damages bytes, as disks, copies and killed writers do; ``text_mutations`` changes
JSON and other text, as people and programs that edit files do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

_WORDS = (0, 1, -1, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63))
_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1 << 31,
    1 << 64,
    10**400,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "1",
    "１",  # a digit, but not of ASCII
    "a\u0301",
    "\ud800",
    "../../x",
    "\0",
    [],
    {},
)


def mutations(original: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged copies of ``original``, each with a description; none is equal to it."""
    chance = random.Random(seed)
    made = 0
    while made < count:
        kind = chance.choice(_BYTE_KINDS)
        what, changed = kind(original, chance)
        if changed != original:
            made += 1
            yield f"{made}: {what}", changed


def text_mutations(original: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """``count`` changed copies of a text, each with a description; none is equal to it.

    Two thirds change the structure where the text is JSON: values, types, keys, order.
    """
    chance = random.Random(seed)
    try:
        root = json.loads(original, object_pairs_hook=_Object)
    except ValueError:
        root = None
    made = 0
    while made < count:
        if isinstance(root, list) and chance.random() < 2 / 3:
            what, changed = _change_structure(original, chance)
        else:
            what, changed = chance.choice(_TEXT_KINDS)(original, chance)
        if changed != original:
            made += 1
            yield f"{made}: {what}", changed


def _span(length: int, chance: random.Random, longest: int = 64) -> tuple[int, int]:
    start = chance.randrange(length + 1)
    return start, min(length, start + chance.randint(1, longest))


def _flip_bit(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    bit = chance.randrange(8 * len(data)) if data else 0
    changed = bytearray(data or b"\0")
    changed[bit // 8] ^= 1 << bit % 8
    return f"bit {bit % 8} of byte {bit // 8} flipped", bytes(changed)


def _set_byte(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    start, end = _span(len(data), chance, longest=1)
    value = chance.choice((0, 0xFF, chance.randrange(256)))
    return f"byte {start} set to {value}", data[:start] + bytes([value]) + data[end:]


def _set_word(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    width = chance.choice((4, 8))
    start = chance.randrange(max(1, len(data) - width + 1))
    value = chance.choice(_WORDS)
    word = (value % (1 << 8 * width)).to_bytes(width, "little")
    what = f"{width} bytes at {start} set to {value}"
    return what, data[:start] + word[: len(data) - start] + data[start + width :]


def _truncate(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    end = chance.randrange(len(data) + 1)
    return f"cut off at byte {end}", data[:end]


def _append(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    added = chance.choice((bytes(chance.randint(1, 16)), chance.randbytes(chance.randint(1, 16))))
    return f"{len(added)} bytes appended ({added.hex()})", data + added


def _insert(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    start, added = chance.randrange(len(data) + 1), chance.randbytes(chance.randint(1, 16))
    return f"{len(added)} bytes inserted at {start}", data[:start] + added + data[start:]


def _remove(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    start, end = _span(len(data), chance)
    return f"bytes {start} to {end} removed", data[:start] + data[end:]


def _zero(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    start, end = _span(len(data), chance, longest=4096)
    return f"bytes {start} to {end} zeroed", data[:start] + bytes(end - start) + data[end:]


def _duplicate(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    start, end = _span(len(data), chance)
    return f"bytes {start} to {end} twice", data[:end] + data[start:]


def _copy_over(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One region over another of the same size, as a misplaced write does."""
    start, end = _span(len(data), chance)
    to = chance.randrange(max(1, len(data) - (end - start) + 1))
    changed = data[:to] + data[start:end] + data[to + end - start :]
    return f"bytes {start} to {end} written over those at {to}", changed


def _swap(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    width = chance.choice((1, 2, 4, 8, 32))
    places = len(data) // width
    if places < 2:
        return "nothing to swap", data
    first, second = sorted(width * each for each in chance.sample(range(places), 2))
    cells = data[:first], data[first : first + width], data[first + width : second]
    rest = data[second : second + width], data[second + width :]
    changed = cells[0] + rest[0] + cells[2] + cells[1] + rest[1]
    return f"{width} bytes at {first} and {second} swapped", changed


_ByteKind = Callable[[bytes, random.Random], tuple[str, bytes]]
_BYTE_KINDS: tuple[_ByteKind, ...] = (
    _flip_bit,
    _flip_bit,  # twice as likely as the others: the smallest damage is the hardest to see
    _set_byte,
    _set_word,
    _truncate,
    _append,
    _insert,
    _remove,
    _zero,
    _duplicate,
    _copy_over,
    _swap,
)


def _change_digit(text: str, chance: random.Random) -> tuple[str, str]:
    places = [place for place, letter in enumerate(text) if letter.isdigit()]
    if not places:
        return "no digit", text
    place = chance.choice(places)
    digit = str(chance.randrange(10))
    return f"character {place} set to {digit}", text[:place] + digit + text[place + 1 :]


def _change_character(text: str, chance: random.Random) -> tuple[str, str]:
    start, end = _span(len(text), chance, longest=1)
    letter = chance.choice('\0 \n",:{}[]0-eE+._/\\aéΩ１\u202e\ufeff\U0001f600')
    return f"character {start} set to {letter!r}", text[:start] + letter + text[end:]


def _remove_text(text: str, chance: random.Random) -> tuple[str, str]:
    start, end = _span(len(text), chance, longest=16)
    return f"characters {start} to {end} removed", text[:start] + text[end:]


def _duplicate_text(text: str, chance: random.Random) -> tuple[str, str]:
    start, end = _span(len(text), chance)
    return f"characters {start} to {end} twice", text[:end] + text[start:]


def _truncate_text(text: str, chance: random.Random) -> tuple[str, str]:
    end = chance.randrange(len(text) + 1)
    return f"cut off at character {end}", text[:end]


_TextKind = Callable[[str, random.Random], tuple[str, str]]
_TEXT_KINDS: tuple[_TextKind, ...] = (
    _change_digit,
    _change_character,
    _remove_text,
    _duplicate_text,
    _truncate_text,
)


class _Object(list[tuple[str, Any]]):
    """A JSON object with its pairs in order, so that a key can stand in it twice."""


def _change_structure(text: str, chance: random.Random) -> tuple[str, str]:
    """Change one place of a JSON document: its value, its key, or that it is there at all."""
    root = json.loads(text, object_pairs_hook=_Object)
    places = list(_places(root, "$"))
    if not places:
        return "no place to change", text
    path, parent, index = chance.choice(places)
    entry = parent[index]
    key, value = entry if isinstance(parent, _Object) else ("", entry)
    kind = chance.choice(("value", "value", "number", "remove", "twice", "key", "swap"))
    if kind == "value":
        value = chance.choice(_VALUES)
    elif kind == "number" and isinstance(value, int | float):
        value = chance.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    elif kind == "key" and isinstance(parent, _Object):
        other = chance.choice(parent)[0]
        key = chance.choice((key + "x", key.upper(), key[1:], "", other))
    elif kind == "swap":
        other_index = chance.randrange(len(parent))
        parent[index], parent[other_index] = parent[other_index], parent[index]
        return f"{path} in another place", _rendered(root)
    parent[index] = (key, value) if isinstance(parent, _Object) else value
    if kind == "remove":
        del parent[index]
    elif kind == "twice":
        parent.insert(index, (key, chance.choice(_VALUES)) if key else value)
    return f"{path}: {kind} changed, now {key} {_rendered(value)[:60]}", _rendered(root)


def _places(node: Any, path: str) -> Iterator[tuple[str, list[Any], int]]:
    if not isinstance(node, list):
        return
    for index, entry in enumerate(node):
        name, value = entry if isinstance(node, _Object) else (index, entry)
        yield f"{path}.{name}", node, index
        yield from _places(value, f"{path}.{name}")


def _rendered(node: Any) -> str:
    if isinstance(node, _Object):
        return "{" + ", ".join(f"{json.dumps(k)}: {_rendered(v)}" for k, v in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_rendered, node)) + "]"
    return json.dumps(node)
