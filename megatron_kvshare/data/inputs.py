"""The input of a command: files, globs, folders, pipes and data sets, as one stream of records.

    for record in open_inputs(words, InputOptions(json_keys=("text",))).records():
        ...

The order is that of the words; inside a glob or a folder that of the names. Memory holds a piece of
input at a time, or one document.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron_kvshare.data.archives import DamagedArchiveError, Source
from megatron_kvshare.data.columns import TABLES, Rows, dataset_rows
from megatron_kvshare.data.cutting import READ_BYTES, cuts
from megatron_kvshare.data.detection import JSON, TEXT, Form, look_into, named_form, opened
from megatron_kvshare.data.documents import (
    BadRecord,
    Document,
    Piece,
    Position,
    Reason,
    Record,
    TextDocuments,
    Unit,
    records,
)
from megatron_kvshare.data.hub import (
    hub_name,
    is_saved,
    open_hub,
    open_saved,
    pinned,
)
from megatron_kvshare.errors import DataError, Fault

MAX_DOCUMENT_BYTES = 64_000_000
STDIN = "standard input"

_BOMB_RATIO, _BOMB_BYTES = 500, 4
"""A file that has grown by more than this ratio, beyond so many of the longest documents allowed,
is no text."""
_METADATA = {
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
}
"""Files that a folder of data has beside its data; `datasets` leaves them out as well."""


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How input is read. ``revision``, ``dataset_config`` and ``dataset_split`` are for data sets
    of the library ``datasets`` alone."""

    json_keys: tuple[str, ...] = ("text",)
    text_documents: TextDocuments = "file"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    revision: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"


class _Input(Protocol):
    """One file, pipe or data set. ``size``: bytes on the disk, None where nobody knows."""

    name: str
    size: int | None

    bytes_read: int

    @property
    def kind(self) -> str: ...

    def identity(self) -> list[Any]:
        """What tells that it is still the same input."""
        ...

    def pieces(self, number: int, start: Position) -> Iterator[Piece]:
        """Its records; ``number``: its own among the inputs."""
        ...


@dataclass
class Inputs:
    """Inputs that were found and looked into; read them once."""

    files: list[_Input]
    options: InputOptions
    warnings: list[str] = field(default_factory=list)
    """What was taken for something else than its name says."""

    @property
    def total_bytes(self) -> int | None:
        """Bytes on the disk; None where nobody knows."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, compressed as they are on the disk."""
        return sum(file.bytes_read for file in self.files)

    def bytes_before(self, position: Position) -> int:
        """About how many of them come before a place."""
        sizes = (file.size or 0 for file in self.files[: position.file])
        return sum(sizes)

    def identity(self) -> list[list[Any]]:
        """What tells that it is still the same input."""
        return [file.identity() for file in self.files]

    def kinds(self) -> dict[str, int]:
        """How many inputs were taken for what."""
        return dict(Counter(file.kind for file in self.files))

    def pieces(self, start: Position | None = None) -> Iterator[Piece]:
        """All input from ``start`` on, in pieces of whole records."""
        start = start or Position()
        for file in self.files[: start.file]:
            file.bytes_read = file.size or 0
        for number in range(start.file, len(self.files)):
            first = start if number == start.file else Position(number)
            yield from self.files[number].pieces(number, first)

    def records(self) -> Iterator[Record]:
        """All documents and bad records, in order."""
        options = self.options
        for piece in self.pieces():
            yield from records(piece, options.json_keys, options.max_document_bytes)

    def documents(self) -> Iterator[Document]:
        """All documents.

        Raises:
            DataError: at the first bad record.
        """
        for record in self.records():
            if isinstance(record, BadRecord):
                raise record.error()
            yield record


def open_inputs(words: Sequence[str], options: InputOptions | None = None) -> Inputs:
    """Find what ``words`` name and look into every file.

    Args:
        words: files, folders, globs, ``-`` for standard input, pipes, or data sets by name
            (``owner/name`` or ``hf://datasets/owner/name``).
        options: how to read.

    Raises:
        DataError: all faults at once: what is missing, empty, or of a kind that is not read.
    """
    options = options or InputOptions()
    found = _Finder(options)
    for word in words:
        found.add(word)
    if not found.faults and not found.files:
        found.faults.append(Fault("--input", " ".join(words), "there are no files", "give some"))
    if found.faults:
        raise DataError(found.faults)
    return Inputs(found.files, options, found.warnings())


class _Finder:
    def __init__(self, options: InputOptions) -> None:
        self.options = options
        self.files: list[_Input] = []
        self.faults: list[Fault] = []
        self._seen: set[str] = set()
        self._twice: list[str] = []
        self._empty: list[str] = []
        self._has_hub = False
        self._misnamed: dict[tuple[Form, Form], list[str]] = {}

    def add(self, word: str) -> None:
        """Find what a word of the command line names."""
        path = Path(word)
        if word == "-":
            self._file(STDIN, Path(os.devnull), sys.stdin.buffer)
        elif word.startswith("hf://"):
            self._hub(word)
        elif path.is_dir():
            self._folder(path, word)
        elif os.path.lexists(path):
            self._file(word, path)
        elif glob.has_magic(word):
            self._glob(word)
        elif hub_name(word):
            self._hub(word)
        else:
            fix = "check the path; globs and folders are taken too, and - for standard input"
            self._fault(word, "there is no such file", fix)

    def _glob(self, word: str) -> None:
        matches = sorted(glob.glob(word, recursive=True))
        for match in matches:
            if os.path.isdir(match):
                self._folder(Path(match), match)
            else:
                self._file(match, Path(match), is_named=False)
        if not matches:
            self._fault(word, "no file matches it", "check the pattern")

    def _folder(self, folder: Path, word: str) -> None:
        if is_saved(folder):
            self._saved(folder, word)
            return
        before = len(self.files) + len(self.faults)
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
            for name in sorted(names):
                if not name.startswith((".", "_")) and name not in _METADATA:
                    self._file(os.path.join(parent, name), Path(parent, name), is_named=False)
        if len(self.files) + len(self.faults) == before:
            self._fault(word, "the folder holds no files of text", "give the folder of the data")

    def _saved(self, folder: Path, word: str) -> None:
        try:
            dataset = open_saved(folder, self.options.dataset_split)
        except DataError as error:
            self.faults += error.faults
        else:
            size = sum(path.stat().st_size for path in folder.rglob("*.arrow"))
            made = str(folder.resolve()), folder.stat().st_mtime_ns
            rows = _DatasetRows(lambda: dataset)
            self.files.append(_Table(word, size, "data set", made, rows, self.options))

    def _hub(self, word: str) -> None:
        name = hub_name(word)
        if name is None:
            fix = "write hf://datasets/OWNER/NAME"
            self._fault(word, "it is no name of a data set", fix)
            return
        options = self.options
        try:
            name = pinned(name, options.revision, options.dataset_config, options.dataset_split)
        except DataError as error:
            self.faults += error.faults
        else:
            self._has_hub = True
            kind = f"data set of the hub {name.name} at {name.revision}"
            rows = _DatasetRows(lambda: open_hub(name))
            self.files.append(_Table(word, None, kind, tuple(name), rows, self.options))

    def _file(
        self, name: str, path: Path, pipe: BinaryIO | None = None, is_named: bool = True
    ) -> None:
        """``is_named``: by the user, not found in a folder."""
        try:
            status = path.stat()
            is_pipe = pipe is not None or not stat.S_ISREG(status.st_mode)
            if not is_pipe and status.st_size == 0:
                if is_named:
                    self._fault(name, "the file is empty", "leave it out")
                self._empty.append(name)
                return
            self._note_twice(name, path, is_pipe)
            file: BinaryIO = pipe or path.open("rb", buffering=0)
            with contextlib.ExitStack() as stack:
                if not is_pipe:
                    stack.enter_context(file)
                seen = look_into(file, name, self.options.json_keys)
        except OSError as error:
            self._fault(name, f"it cannot be read ({error})", "check path and rights")
            return
        if seen.foreign is not None:
            rule = f"it is a {seen.foreign.name} file, which is not read"
            self._fault(name, rule, seen.foreign.fix)
            return
        if is_pipe and seen.form.is_table:
            rule = f"{seen.form.kind} cannot be read from a pipe"
            self._fault(name, rule, "give the file itself")
            return
        if seen.form.kind == TEXT and len(self.options.json_keys) > 1:
            keys, fix = " ".join(self.options.json_keys), "give one key, or .jsonl files"
            self.faults.append(Fault("--json-keys", keys, f"{name} is plain text", fix))
            return
        named = named_form(name)
        if named != seen.form and not is_pipe:
            self._misnamed.setdefault((named, seen.form), []).append(name)
        if seen.form.is_table:
            made = str(path.resolve()), status.st_size, status.st_mtime_ns
            rows = _FileRows(TABLES[seen.form.kind], path)
            kind, size = seen.form.kind, status.st_size
            self.files.append(_Table(name, size, kind, made, rows, self.options))
        elif is_pipe:
            self.files.append(_Text(name, None, seen.form, self.options, None, seen.content))
        else:
            self.files.append(_Text(name, status.st_size, seen.form, self.options, path, None))

    def _note_twice(self, name: str, path: Path, is_pipe: bool) -> None:
        real = name if is_pipe else str(path.resolve())
        if real in self._seen:
            self._twice.append(name)
        self._seen.add(real)

    def _fault(self, value: str, rule: str, fix: str) -> None:
        self.faults.append(Fault("--input", value, rule, fix))

    def warnings(self) -> list[str]:
        """What the user should know of the files found."""
        found = [
            f"{_some(names)}: by name {named}, by content {form}; the content counts"
            for (named, form), names in self._misnamed.items()
        ]
        if (self.options.revision or self.options.dataset_config) and not self._has_hub:
            found.append(
                "--revision and --dataset-config are for data sets of the hub: no input is"
            )
        if self._twice:
            found.append(f"{_some(self._twice)}: given twice, and read twice")
        if self._empty:
            found.append(f"{_some(self._empty)}: empty, left out")
        return found


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


@dataclass
class _Text:
    """JSON lines or plain text: a file at ``path``, or the content of a pipe."""

    name: str
    size: int | None
    form: Form
    options: InputOptions
    path: Path | None
    pipe: Source | None
    bytes_read: int = 0

    @property
    def kind(self) -> str:
        return str(self.form)

    def identity(self) -> list[Any]:
        if self.path is None:  # what comes through a pipe may be other text each time
            return [self.name, uuid.uuid4().hex]
        status = self.path.stat()
        return [str(self.path.resolve()), status.st_size, status.st_mtime_ns, self.kind]

    @property
    def unit(self) -> Unit:
        return "json" if self.form.kind == JSON else self.options.text_documents

    def pieces(self, number: int, start: Position) -> Iterator[Piece]:
        offset, line = start.offset, start.number
        try:
            with contextlib.ExitStack() as stack:
                read = self._reader(stack, offset)
                for cut in cuts(read, self.unit, self.options.max_document_bytes):
                    content: bytes | BadRecord | None = cut.content
                    if content is None:
                        limit = self.options.max_document_bytes / 1e6
                        rule = f"longer than {limit:g} MB (--max-document-mb), left unread"
                        at = 0 if self.unit == "file" else line
                        content = BadRecord(Reason.TOO_LONG, self.name, at, rule)
                    offset, first, line = offset + cut.size, line, line + cut.lines
                    end = Position(number, offset, line)
                    yield Piece(self.name, self.unit, first, content, end)
        except (OSError, DamagedArchiveError) as error:
            yield _unreadable(self.name, number, line, error)

    def _reader(self, stack: contextlib.ExitStack, offset: int) -> Callable[[int], bytes]:
        """Reads the content from ``offset`` on."""
        if self.path is None:
            assert self.pipe is not None, "a pipe stays open"
            reader = _Reader(self, self.pipe, None)
        else:
            file = stack.enter_context(self.path.open("rb", buffering=0))
            content = opened(file, self.form)
            if content is file:
                file.seek(offset)
                offset = 0
            reader = _Reader(self, content, file)
        while offset and (skipped := len(reader.read(min(READ_BYTES, offset)))):
            offset -= skipped
        return reader.read


class _Reader:
    """Reads content to the last byte before damage, and keeps count."""

    def __init__(self, text: _Text, content: Source, file: BinaryIO | None) -> None:
        """``file``: what lies on the disk, ``content`` is read out of it."""
        self._text, self._content, self._file = text, content, file
        self._found = 0
        self._damage: OSError | DamagedArchiveError | None = None

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer before the end or damage; none at the end.

        Raises:
            OSError, DamagedArchiveError: at damage.
        """
        parts: list[bytes] = []
        try:
            while size and self._damage is None and (data := self._content.read(size)):
                parts.append(data)
                size -= len(data)
                self._count(len(data))
        except (OSError, DamagedArchiveError) as error:
            self._damage = error
        if not parts and self._damage is not None:
            raise self._damage
        return b"".join(parts)

    def _count(self, size: int) -> None:
        self._found += size
        if self._file is None:
            self._text.bytes_read = self._found
            return
        taken = self._text.bytes_read = self._file.tell()
        most = _BOMB_BYTES * self._text.options.max_document_bytes
        if self._found > max(most, _BOMB_RATIO * taken):
            grown = f"{self._found / 1e6:,.0f} MB out of {taken / 1e6:,.1f} MB"
            raise DamagedArchiveError(f"{grown}: a decompression bomb, not text")


class _RowSource(Protocol):
    def __call__(self, where: str, keys: Sequence[str], start: int, /) -> Iterator[Rows]: ...


@dataclass(frozen=True)
class _FileRows:
    read: Callable[[Path, str, Sequence[str], int], Iterator[Rows]]
    path: Path

    def __call__(self, where: str, keys: Sequence[str], start: int) -> Iterator[Rows]:
        return self.read(self.path, where, keys, start)


@dataclass(frozen=True)
class _DatasetRows:
    open: Callable[[], Any]

    def __call__(self, where: str, keys: Sequence[str], start: int) -> Iterator[Rows]:
        return dataset_rows(self.open(), where, keys, start)


@dataclass
class _Table:
    """Rows of a file or of a data set."""

    name: str
    size: int | None
    kind: str
    made: Sequence[Any]
    rows: _RowSource
    options: InputOptions
    bytes_read: int = 0

    def identity(self) -> list[Any]:
        return [*self.made, self.kind]

    def pieces(self, number: int, start: Position) -> Iterator[Piece]:
        row = start.offset
        rows = self.rows(self.name, self.options.json_keys, row)
        while True:
            try:
                first, columns = next(rows)
            except StopIteration:
                break
            except DataError:
                raise  # the table has no such column
            except Exception as error:  # many kinds, for what a damaged file or a network may do
                yield _unreadable(self.name, number, row + 1, error)
                return
            row = first + len(columns[0])
            yield Piece(self.name, "row", first + 1, columns, Position(number, row, row + 1))
        self.bytes_read = self.size or 0


def _unreadable(name: str, number: int, line: int, error: Exception) -> Piece:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    rule = f"cannot be read, or not further than here ({reason})"
    bad = BadRecord(Reason.DAMAGED, name, line if line > 1 else 0, rule)
    return Piece(name, "file", line, bad, Position(number + 1))
