"""A stream of bytes cut into pieces between its records, in bounded memory.

A record longer than the limit is read past without being kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_kvshare.data.documents import Unit

READ_BYTES = 1 << 18
"""What is read at once; a piece is about as large, or as large as one record."""

_BLANK_LINE = re.compile(rb"\n[ \t\r\v\f]*\n")


class Cut(NamedTuple):
    """Bytes of a stream: whole records, or None for one that was too long to keep."""

    content: bytes | None
    size: int
    lines: int
    """Line breaks in them."""


class _Border(NamedTuple):
    """How records end. Both give the place behind an end, 0 where there is none."""

    first: Callable[[bytearray], int]
    last: Callable[[bytearray, int], int]
    """From a place in the bytes on."""
    overlap: int
    """Bytes of an end that may have come with an earlier read."""


def _last_blank(content: bytearray, start: int) -> int:
    end = 0
    for found in _BLANK_LINE.finditer(content, start):
        end = found.end()
    return end


def _first_blank(content: bytearray) -> int:
    found = _BLANK_LINE.search(content)
    return found.end() if found else 0


_LINE = _Border(
    lambda content: content.find(b"\n") + 1,
    lambda content, start: content.rfind(b"\n", start) + 1,
    0,
)
_BORDERS: dict[Unit, _Border] = {
    "json": _LINE,
    "line": _LINE,
    "paragraph": _Border(_first_blank, _last_blank, 80),
    "file": _Border(lambda _: 0, lambda _, __: 0, 0),
}


def cuts(read: Callable[[int], bytes | None], unit: Unit, max_bytes: int) -> Iterator[Cut]:
    """Cut what ``read(size)`` gives, up to ``size`` bytes, until it gives nothing; a record may
    have ``max_bytes``.

    What ``read`` raises ends the stream; whole records before that have been given.
    """
    border = _BORDERS[unit]
    rest = bytearray()
    while data := read(READ_BYTES):
        searched = max(0, len(rest) - border.overlap)
        rest += data
        end = border.last(rest, searched)
        if end:
            yield _kept(bytes(rest[:end]))
            del rest[:end]
        if len(rest) > max_bytes:
            size, lines, rest = _skipped(read, border, rest)
            yield Cut(None, size, lines)
    if rest:
        yield _kept(bytes(rest))


def _kept(content: bytes) -> Cut:
    return Cut(content, len(content), content.count(b"\n"))


def _skipped(
    read: Callable[[int], bytes | None], border: _Border, start: bytearray
) -> tuple[int, int, bytearray]:
    """Read past a record that begins with ``start``: its bytes, its lines, and what follows it."""
    size, lines = 0, 0
    recent = start
    while not (end := border.first(recent)):
        gone = max(0, len(recent) - border.overlap)
        size += gone
        lines += recent.count(b"\n", 0, gone)
        del recent[:gone]
        data = read(READ_BYTES)
        if not data:
            end = len(recent)
            break
        recent += data
    return size + end, lines + recent.count(b"\n", 0, end), recent[end:]
