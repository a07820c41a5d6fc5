"""What a file is, by its content: compression, encoding, and whether it is JSON lines, plain text
or a table. Its name only says what to expect; where it is wrong, a warning says so.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from megatron_kvshare.data.archives import (
    SUFFIXES,
    DamagedArchiveError,
    Foreign,
    Source,
    compression,
    decompressed,
    foreign,
)

_HEAD = 1 << 16
_LONG_HEAD = 1 << 20
"""Bytes that are looked at: more where the first line is longer."""
_LINES = 20
_LAYERS = 3
"""How often a file may be compressed."""

JSON, TEXT, PARQUET, ARROW = "JSON lines", "plain text", "Parquet", "Arrow"
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TABLE_SUFFIXES = {".parquet": PARQUET, ".arrow": ARROW, ".feather": ARROW}

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MANY, _FEW = 0.4, 0.05
"""Shares of zero bytes at every second place that tell UTF-16 from other data."""


class Form(NamedTuple):
    """What a file is: ``kind`` of content, in ``encoding``, compressed by ``compressions`` (the
    outermost first)."""

    kind: str
    compressions: tuple[str, ...] = ()
    encoding: str = "utf-8"

    @property
    def is_table(self) -> bool:
        """Whether it is rows of columns."""
        return self.kind in (PARQUET, ARROW)

    def __str__(self) -> str:
        encoding = "" if self.encoding == "utf-8" else f" in {self.encoding.upper()}"
        return f"{self.kind}{encoding}" + "".join(f", {name}" for name in self.compressions)


def named_form(name: str) -> Form:
    """What a file is by its name."""
    path = PurePath(name.lower())
    compressions = []
    while path.suffix in SUFFIXES:
        compressions.append(SUFFIXES[path.suffix])
        path = path.with_suffix("")
    kind = JSON if path.suffix in _JSON_SUFFIXES else _TABLE_SUFFIXES.get(path.suffix, TEXT)
    return Form(kind, tuple(compressions))


class Seen(NamedTuple):
    """A file that was looked into: what it is, or the foreign kind that it is; and its content,
    from the first byte on and decompressed."""

    form: Form
    foreign: Foreign | None
    content: Ahead


def look_into(file: Source, name: str, keys: Sequence[str]) -> Seen:
    """Find what a file is by its first bytes; ``file`` is used up by it.

    Damage is met by whoever reads the content, not here.
    """
    content = Ahead(file)
    head = content.peek(_HEAD)
    layers: list[str] = []
    while (found := compression(head)) and len(layers) < _LAYERS:
        layers.append(found)
        content = Ahead(decompressed(found, content))
        head = content.peek(_HEAD)
    if head.startswith(b"PAR1"):
        return Seen(Form(PARQUET, tuple(layers)), _packed(layers), content)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Seen(Form(ARROW, tuple(layers)), _packed(layers), content)
    encoding = _encoding(head)
    if encoding != "utf-8":
        content = Ahead(Transcoded(content, encoding))
        head = content.peek(_HEAD)
    if b"\n" not in head:
        head = content.peek(_LONG_HEAD)
    named = named_form(name)
    is_json = _is_json_lines(head, named.kind == JSON, keys)
    form = Form(JSON if is_json else TEXT, tuple(layers), encoding)
    unread = foreign(head) or (_array(head) if named.kind == JSON else None)
    return Seen(form, unread, content)


def opened(file: Source, form: Form) -> Source:
    """The content of a file of a known form, decompressed and in UTF-8."""
    content = file
    for name in form.compressions:
        content = decompressed(name, content)
    return content if form.encoding == "utf-8" else Transcoded(content, form.encoding)


def _packed(layers: Sequence[str]) -> Foreign | None:
    if not layers:
        return None
    return Foreign(f"compressed ({', '.join(layers)}) table", "decompress it first")


def _array(head: bytes) -> Foreign | None:
    """A JSON array of objects over many lines is no JSON lines."""
    if not re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", head):
        return None
    return Foreign("JSON array", "write one object per line (jq -c '.[]')")


def _encoding(head: bytes) -> str:
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    even, odd = (head[i::2].count(0) / max(1, len(head[i::2])) for i in (0, 1))
    if odd >= _MANY and even <= _FEW:
        return "utf-16-le"
    return "utf-16-be" if even >= _MANY and odd <= _FEW else "utf-8"


def _is_json_lines(head: bytes, is_named: bool, keys: Sequence[str]) -> bool:
    """A JSON object on one of the first lines makes it so, for a file that is not named like that
    only with text under one of the keys: text may be about JSON."""
    lines = [line for line in head.split(b"\n", 10 * _LINES) if line.strip()][:_LINES]
    objects = [found for line in lines if isinstance(found := _json(line), dict)]
    if is_named:
        return bool(objects) or head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[", b'"', b"")
    if any(isinstance(found.get(key), str) for found in objects for key in keys):
        return True
    is_long = len(head) >= _LONG_HEAD and len(lines) == 1
    return is_long and any(_starts_object(head, key) for key in keys)


def _starts_object(head: bytes, key: str) -> bool:
    quoted = re.escape(json.dumps(key, ensure_ascii=False).encode("utf-8", "replace"))
    return bool(re.match(rb'\s*\{\s*"', head) and re.search(quoted + rb'\s*:\s*"', head))


def _json(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_int=float)
    except (ValueError, RecursionError):
        return None


class Ahead(io.RawIOBase):
    """Content whose first bytes can be looked at before it is read."""

    def __init__(self, file: Source) -> None:
        self._file = file
        self._ahead = b""
        self._damage: DamagedArchiveError | OSError | None = None

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer at the end or before damage."""
        try:
            while len(self._ahead) < size and (more := self._file.read(size - len(self._ahead))):
                self._ahead += more
        except (DamagedArchiveError, OSError) as error:
            self._damage = error
        return self._ahead

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if not self._ahead and self._damage is not None:
            raise self._damage
        data = self._ahead[: len(view)] or self._file.read(len(view)) or b""
        self._ahead = self._ahead[len(data) :]
        view[: len(data)] = data
        return len(data)


class Transcoded(io.RawIOBase):
    """Text of another encoding in UTF-8, without its byte order mark. What is no character becomes
    what is none in UTF-8 either, so that its record is found to be a bad one."""

    def __init__(self, file: Source, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ready = b""
        self._is_first = True
        self._is_over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._ready and not self._is_over:
            data = self._file.read(len(view)) or b""
            self._is_over = not data
            try:
                text = self._decoder.decode(data, final=self._is_over)
            except UnicodeDecodeError as error:
                raise DamagedArchiveError(f"it is not {error.encoding} ({error.reason})") from error
            if self._is_first and text:
                text, self._is_first = text.removeprefix("\ufeff"), False
            self._ready = text.encode("utf-8", "surrogatepass")
        data, self._ready = self._ready[: len(view)], self._ready[len(view) :]
        view[: len(data)] = data
        return len(data)
