"""Documents from files: ``.jsonl`` and plain text, either compressed (xz, gzip, bzip2).

* ``.jsonl`` / ``.json``: one JSON object per line, the text under a key (``text``), as Megatron
  reads it.
* any other name is plain text. A file is one document, or every paragraph (text between blank
  lines) or every line is one.

Reading streams: memory holds one document at a time, whatever the size of the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Literal, cast

from megatron_kvshare.data.archives import (
    SUFFIXES,
    DamagedArchiveError,
    misnamed,
    uncompressed,
)
from megatron_kvshare.errors import DataError, Fault

TextDocuments = Literal["file", "paragraph", "line"]

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class RawDocument:
    """One document as it is in the file: ``content`` is a JSON object or plain text, in UTF-8."""

    content: bytes
    is_json: bool
    where: str
    """File and line, for errors."""

    def texts(self, keys: Sequence[str]) -> list[str]:
        """The text under each key; plain text counts as the text of a single key.

        Raises:
            DataError: not UTF-8, not a JSON object, or a key is missing or not text.
        """
        try:
            decoded = self.content.decode("utf-8-sig")
            record = json.loads(decoded) if self.is_json else None
        except (ValueError, RecursionError) as error:
            kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            fix = "correct the file: .jsonl holds one JSON object per line, all text is UTF-8"
            raise _fault(self.where, self.content[:60], f"not {kind} ({error})", fix) from error
        if self.is_json:
            return [_LONE_SURROGATE.sub("\ufffd", text) for text in self._pick(record, keys)]
        if len(keys) > 1:
            fix = "give one key, or .jsonl files"
            raise _fault("--json-keys", " ".join(keys), f"{self.where} is plain text", fix)
        self._check_plain(decoded, keys)
        return [decoded.replace("\r\n", "\n")]

    def _check_plain(self, text: str, keys: Sequence[str]) -> None:
        """Plain text is neither UTF-16, half of whose bytes are often zero, nor JSON lines."""
        if "\0" in text:
            fix = "write it as UTF-8 (UTF-16 has such bytes), and leave files that are no text out"
            raise _fault(self.where, text[:20], "the text holds zero bytes", fix)
        first = text.lstrip()[:1] == "{" and _json(text.lstrip().partition("\n")[0])
        if isinstance(first, dict) and any(isinstance(first.get(key), str) for key in keys):
            rule = "by its name this is plain text, and its lines are JSON objects"
            raise _fault(self.where, text[:60], rule, "give the file a name that ends in .jsonl")

    def _pick(self, record: object, keys: Sequence[str]) -> list[str]:
        if not isinstance(record, dict):
            fix = 'write lines such as {"text": "..."}'
            raise _fault(self.where, str(record)[:60], "the line is not a JSON object", fix)
        texts = [record.get(key) for key in keys]
        for key, text in zip(keys, texts, strict=True):
            if not isinstance(text, str):
                names = ", ".join(record) or "none"
                fix = f"name the key of the text with --json-keys; this line has: {names}"
                raise _fault(self.where, key, "the line has no text under this key", fix)
        return cast("list[str]", texts)


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class DocumentReader:
    """Streams the documents of some files, in the order given; iterate once.

    ``total_bytes`` is the size of the files on disk and ``bytes_read`` how much of it has been
    read.

    Args:
        paths: files.
        text_documents: what is one document in plain text.

    Raises:
        DataError: naming every missing or empty file; while iterating: a file cannot be read or
        decompressed.
    """

    def __init__(self, paths: Sequence[str], text_documents: TextDocuments = "file") -> None:
        self.paths = [Path(path) for path in paths]
        self.text_documents = text_documents
        self.total_bytes = _check_files(self.paths)
        self._done_bytes = 0
        self._file: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, compressed as they are on disk."""
        return self._done_bytes + (self._file.tell() if self._file is not None else 0)

    def __iter__(self) -> Iterator[RawDocument]:
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    self._file = file
                    yield from self._read(path, uncompressed(path, file))
                    self._file = None
            except (OSError, DamagedArchiveError) as error:
                fix = "check that the file is complete and readable"
                raise _fault("--input", str(path), f"cannot be read ({error})", fix) from error
            self._done_bytes += path.stat().st_size

    def _read(self, path: Path, stream: IO[bytes]) -> Iterator[RawDocument]:
        if is_jsonl(path):
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield RawDocument(line, True, f"{path}:{number}")
        elif self.text_documents == "file":
            yield RawDocument(stream.read(), False, str(path))
        else:
            yield from _read_pieces(path, stream, single_lines=self.text_documents == "line")


def is_jsonl(path: Path) -> bool:
    """Whether a file holds one JSON object per line, by its name without .xz, .gz or .bz2."""
    name = path.name.lower()
    bare = path.with_suffix("").name.lower() if name.endswith(SUFFIXES) else name
    return bare.endswith((".jsonl", ".json", ".ndjson"))


def _read_pieces(path: Path, stream: IO[bytes], single_lines: bool) -> Iterator[RawDocument]:
    lines: list[bytes] = []
    for number, line in enumerate(stream, 1):
        is_blank = not line.strip()
        if not is_blank:
            lines.append(line)
        if lines and (is_blank or single_lines):
            yield RawDocument(b"".join(lines).rstrip(b"\r\n"), False, f"{path}:{number}")
            lines = []
    if lines:
        yield RawDocument(b"".join(lines).rstrip(b"\r\n"), False, str(path))


def _check_files(paths: Sequence[Path]) -> int:
    faults = []
    for path in paths:
        if not path.is_file():
            rule = "is a folder" if path.is_dir() else "there is no such file"
            fix = "give the files themselves, for example --input folder/*.jsonl"
            faults.append(Fault("--input", str(path), rule, fix))
        elif path.stat().st_size == 0:
            faults.append(Fault("--input", str(path), "the file is empty", "leave it out"))
        else:
            faults += _content_faults(path)
    if faults:
        raise DataError(faults)
    return sum(path.stat().st_size for path in paths)


def _content_faults(path: Path) -> list[Fault]:
    try:
        wrong = misnamed(path)
    except OSError as error:
        fix = "check path and rights"
        return [Fault("--input", str(path), f"it cannot be read ({error})", fix)]
    return [] if wrong is None else [Fault("--input", str(path), *wrong)]


def _fault(where: str, value: object, rule: str, fix: str) -> DataError:
    return DataError(Fault(where=where, value=value, rule=rule, fix=fix))
