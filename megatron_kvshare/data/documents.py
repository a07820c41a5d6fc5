"""Documents out of pieces of input: what is one, and what is wrong with one that is none.

Every record of the input becomes a :class:`Document` or a :class:`BadRecord`; none disappears.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from megatron_kvshare.errors import DataError, Fault

TextDocuments = Literal["file", "paragraph", "line"]
"""What is one document in plain text; a paragraph ends at a blank line."""

Unit = Literal["json", "line", "paragraph", "file", "row"]
"""What the records of a piece are."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK = b" \t\r\v\f\xef\xbb\xbf"
"""Bytes of a line without content: spaces, and a byte order mark in UTF-8."""
_SHOWN = 200
"""Characters of a bad record that are shown."""


class Reason(StrEnum):
    """Why a record is no document."""

    NOT_JSON = "broken JSON"
    NOT_OBJECT = "not a JSON object"
    MISSING = "missing key"
    NULL = "null"
    NOT_TEXT = "not text"
    NOT_UTF8 = "invalid UTF-8"
    SURROGATE = "lone surrogate"
    NUL = "NUL character"
    TOO_LONG = "longer than --max-document-mb"
    DAMAGED = "damaged file"
    EMPTY = "without text"


_FIXES = {
    Reason.NOT_JSON: "correct the file: .jsonl holds one JSON object per line, all text is UTF-8",
    Reason.NOT_OBJECT: 'write lines such as {"text": "..."}',
    Reason.NOT_UTF8: "correct the file: all text is UTF-8",
    Reason.NUL: "write it as UTF-8, and leave files that are no text out",
    Reason.TOO_LONG: "raise --max-document-mb, or cut the document",
    Reason.DAMAGED: "check that the file is complete and readable",
}
SKIP = "or leave such records out with --on-bad-record skip"


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document. ``number``: of its line or row, 0 for a whole file."""

    reason: Reason
    file: str
    number: int
    rule: str
    value: str = ""
    fix: str = ""

    @property
    def where(self) -> str:
        """File and line."""
        return place(self.file, self.number)

    def error(self, skippable: bool = False) -> DataError:
        """The error of a run that stops here; ``skippable``: it could go on without the record."""
        fix = self.fix or _FIXES.get(self.reason, "correct the record")
        value = self.value or None
        return DataError(
            Fault(self.where, value, self.rule, f"{fix}, {SKIP}" if skippable else fix)
        )


class Document(NamedTuple):
    """The text under each key, and where it stands. ``number``: line or row, 0 for a file."""

    texts: list[str]
    file: str
    number: int

    @property
    def where(self) -> str:
        """File and line."""
        return place(self.file, self.number)


Record = Document | BadRecord


def place(file: str, number: int) -> str:
    """A line or row of a file, for messages."""
    return f"{file}:{number}" if number else file


@dataclass(frozen=True)
class Piece:
    """Whole records of one file, next to each other, as they are there.

    ``content``: lines or text in UTF-8; rows as one list of UTF-8 values per key, None for null;
    or what the reader could not read. ``number``: of the first line or row; ``end``: where reading
    goes on after the piece.
    """

    file: str
    unit: Unit
    number: int
    content: bytes | list[list[bytes | None]] | BadRecord
    end: Position

    @property
    def size(self) -> int:
        """Bytes of text."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if isinstance(self.content, list):
            return sum(len(value) for values in self.content for value in values if value)
        return 0


class Position(NamedTuple):
    """A place in the input between two records: the number of the file, how many bytes of its
    content (rows of a table) come before, and the number of the next line or row."""

    file: int = 0
    offset: int = 0
    number: int = 1


def records(piece: Piece, keys: Sequence[str], max_bytes: int) -> Iterator[Record]:
    """All records of a piece, in order. ``max_bytes``: larger ones are bad ones."""
    if isinstance(piece.content, BadRecord):
        yield piece.content
        return
    if isinstance(piece.content, list):
        for row, values in enumerate(zip(*piece.content, strict=True), piece.number):
            yield _row(_At(piece.file, row), values, keys, max_bytes)
        return
    for number, content in _units(piece.unit, piece.content, piece.number):
        at = _At(piece.file, number)
        if len(content) > max_bytes:
            yield at.too_long(max_bytes)
        elif piece.unit == "json":
            yield _json_line(at, content, keys)
        else:
            yield _plain(at, content)


def _units(unit: Unit, content: bytes, number: int) -> Iterator[tuple[int, bytes]]:
    """The records of plain text or JSON lines, each with the number of its first line."""
    if unit == "file":
        yield 0, content
        return
    if unit != "paragraph":
        for line_number, line in enumerate(content.split(b"\n"), number):
            if line.strip(_BLANK):
                yield line_number, line
        return
    lines: list[bytes] = []
    for line_number, line in enumerate(content.split(b"\n"), number):
        if line.strip(_BLANK):
            lines.append(line)
        elif lines:
            yield line_number - len(lines), b"\n".join(lines)
            lines = []
    if lines:
        yield line_number - len(lines) + 1, b"\n".join(lines)


class _At(NamedTuple):
    file: str
    number: int

    def bad(self, reason: Reason, rule: str, value: object = "", fix: str = "") -> BadRecord:
        shown = value[:_SHOWN].decode("utf-8", "replace") if isinstance(value, bytes) else value
        text = str(shown)[:_SHOWN].encode("utf-8", "replace").decode()
        return BadRecord(reason, self.file, self.number, rule, text, fix)

    def too_long(self, max_bytes: int) -> BadRecord:
        return self.bad(Reason.TOO_LONG, f"longer than {max_bytes / 1e6:g} MB (--max-document-mb)")


def _json_line(at: _At, line: bytes, keys: Sequence[str]) -> Record:
    try:
        decoded = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return at.bad(Reason.NOT_UTF8, f"not UTF-8 ({error})", line)
    try:
        # No number is of interest, and Python refuses to read long ones.
        record = json.loads(decoded, parse_int=float)
    except (ValueError, RecursionError) as error:
        return at.bad(Reason.NOT_JSON, f"not JSON ({error})", decoded)
    if not isinstance(record, dict):
        return at.bad(Reason.NOT_OBJECT, "the line is not a JSON object", decoded)
    texts = []
    for key in keys:
        text = record.get(key)
        if not isinstance(text, str):
            return _no_text(at, key, record, decoded)
        if bad := _crooked(at, text):
            return bad
        texts.append(text)
    return Document(texts, *at)


def _no_text(at: _At, key: str, record: dict[str, object], line: str) -> BadRecord:
    names = ", ".join(record) or "none"
    fix = f"name the key of the text with --json-keys; this line has: {names[:_SHOWN]}"
    reason, found = Reason.MISSING, "it is missing"
    if key in record:
        value = record[key]
        reason = Reason.NULL if value is None else Reason.NOT_TEXT
        found = "it is null" if value is None else f"it is a {_JSON_KINDS[type(value)]}"
    return at.bad(reason, f"the line has no text under this key, {key!r}: {found}", line, fix)


_JSON_KINDS = {bool: "truth value", float: "number", list: "list", dict: "object"}


def _crooked(at: _At, text: str) -> BadRecord | None:
    """What tokenizers trip over."""
    if "\0" in text:
        return at.bad(Reason.NUL, "the text holds zero bytes", text)
    # All that holds one fails to encode; the expression alone takes ten times as long.
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            found = _LONE_SURROGATE.search(text)
            assert found is not None
            shown = text[max(0, found.start() - 40) : found.start() + 40]
            rule = f"half of a surrogate pair (\\u{ord(found[0]):04x}) is no character"
            return at.bad(Reason.SURROGATE, rule, shown)
    return None


def _decoded(at: _At, content: bytes, encoding: str = "utf-8") -> str | BadRecord:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        return at.bad(Reason.NOT_UTF8, f"not UTF-8 ({error})", content)
    return _crooked(at, text) or text


def _plain(at: _At, content: bytes) -> Record:
    text = _decoded(at, content, "utf-8-sig")
    if isinstance(text, BadRecord):
        return text
    text = text.replace("\r\n", "\n")
    return Document([text.rstrip("\r\n") if at.number else text], *at)


def _row(at: _At, values: Sequence[bytes | None], keys: Sequence[str], max_bytes: int) -> Record:
    texts = []
    for key, value in zip(keys, values, strict=True):
        if value is None:
            return at.bad(Reason.NULL, f"the column {key!r} is null here")
        if len(value) > max_bytes:
            return at.too_long(max_bytes)
        text = _decoded(at, value)
        if isinstance(text, BadRecord):
            return text
        texts.append(text)
    return Document(texts, *at)
