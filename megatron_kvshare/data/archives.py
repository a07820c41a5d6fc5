"""Compressed files, to their last byte: ``.xz``, ``.gz`` and ``.bz2`` of one or more streams.

The readers of Python's library end at the first thing behind a stream that is not another one, or
that is a damaged one, and call it the end of the file. Here every byte belongs to a stream, or to
padding that the format allows, or is an error that says where it lies.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

_CHUNK = 1 << 16


class DamagedArchiveError(Exception):
    """What is wrong, and at which byte of the file."""


class _Decoder(Protocol):
    """Decodes one stream; what Python's decoders for xz and bzip2 have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """zlib's decoder, which checks length and CRC of a member, behind the interface of others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._filled = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._filled and not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self._filled = len(found) == max_length
        return found


class _Format(NamedTuple):
    """``padding``: zero bytes may follow a stream, in multiples of this; 0: none may."""

    name: str
    magic: bytes
    decoder: Callable[[], _Decoder]
    padding: int


_FORMATS = {
    ".xz": _Format("xz", b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 4),
    ".gz": _Format("gzip", b"\x1f\x8b", _GzipDecoder, 1),
    ".bz2": _Format("bzip2", b"BZh", bz2.BZ2Decompressor, 0),
}
SUFFIXES = tuple(_FORMATS)
"""Names of compressed files end in one of these."""

_OTHERS = {
    b"\x28\xb5\x2f\xfd": ("Zstandard", "decompress it first (zstd -d)"),
    b"\x04\x22\x4d\x18": ("LZ4", "decompress it first (lz4 -d)"),
    b"\x1f\x9d": ("compress (.Z)", "decompress it first (gzip -d)"),
    b"PK\x03\x04": ("zip", "unpack it first (unzip)"),
    b"PK\x05\x06": ("zip", "unpack it first (unzip)"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "unpack it first"),
    b"Rar!\x1a\x07": ("RAR", "unpack it first"),
    b"PAR1": ("Parquet", "write its text as .jsonl first"),
    b"ARROW1": ("Arrow", "write its text as .jsonl first"),
    b"Obj\x01": ("Avro", "write its text as .jsonl first"),
    b"%PDF-": ("PDF", "extract its text first"),
    b"SQLite format 3\0": ("SQLite", "write its text as .jsonl first"),
    b"\x93NUMPY": ("NumPy", "give text"),
    b"MMIDIDX\0\0": ("Megatron index", "give text; such files are for --data-path"),
}
_LONGEST_MAGIC = 16


class Misnamed(NamedTuple):
    """A file whose content is not what its name says: the ``rule`` it breaks, and the ``fix``."""

    rule: str
    fix: str


def misnamed(path: Path) -> Misnamed | None:
    """Whether a file is of another kind than it is named, or of one that is not read.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_LONGEST_MAGIC)
    named = _FORMATS.get(path.suffix.lower())
    if named is not None:
        if head.startswith(named.magic):
            return None
        return Misnamed(f"it is not a {named.name} file", f"name it without {path.suffix}")
    for suffix, form in _FORMATS.items():
        if head.startswith(form.magic) and (form.name != "bzip2" or head[4:10] == b"1AY&SY"):
            return Misnamed(f"it is a {form.name} file", f"name it {path.name}{suffix}")
    for magic, (name, fix) in _OTHERS.items():
        if head.startswith(magic):
            return Misnamed(f"it is a {name} file, which is not read", fix)
    return None


def uncompressed(path: Path, file: BinaryIO) -> BinaryIO:
    """The content of ``file``, which is opened at ``path``, decompressed by its name.

    Reading raises :class:`DamagedArchiveError`.
    """
    form = _FORMATS.get(path.suffix.lower())
    return file if form is None else io.BufferedReader(_Streams(file, form), _CHUNK)


class _Streams(io.RawIOBase):
    """All streams of a file, one after another."""

    def __init__(self, file: BinaryIO, form: _Format) -> None:
        self._file, self._form = file, form
        self._decoder: _Decoder | None = None
        self._rest = b""
        self._taken = 0
        """Bytes of the file that went to decoders or were padding; ``_rest`` comes after them."""
        self._number = self._start = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while self._decoder is not None or self._begin():
            found = self._decode(len(view))
            if found:
                view[: len(found)] = found
                return len(found)
        return 0

    def _begin(self) -> bool:
        """Find the next stream; False at the end of the file."""
        zeros = self._skip_padding() if self._number else 0
        more = self._fill(len(self._form.magic))
        if zeros % (self._form.padding or 1):
            rule = f"{zeros} zero bytes before byte {self._taken}"
            raise DamagedArchiveError(f"{rule}, where multiples of {self._form.padding} may be")
        if not more and self._number:
            return False
        if not self._rest.startswith(self._form.magic):
            raise DamagedArchiveError(
                f"what begins at byte {self._taken} is not {self._form.name} data"
            )
        self._decoder = self._form.decoder()
        self._number += 1
        self._start = self._taken
        return True

    def _skip_padding(self) -> int:
        if not self._form.padding:
            return 0
        start = self._taken
        while self._fill(1) and not self._rest.strip(b"\0"):
            self._taken += len(self._rest)
            self._rest = b""
        kept = self._rest.lstrip(b"\0")
        self._taken += len(self._rest) - len(kept)
        self._rest = kept
        return self._taken - start

    def _fill(self, size: int) -> bool:
        """Have ``size`` bytes at hand, or what is left; False at the end of the file."""
        while len(self._rest) < size and (more := self._file.read(_CHUNK)):
            self._rest += more
        return bool(self._rest)

    def _decode(self, size: int) -> bytes:
        decoder = self._decoder
        assert decoder is not None, "a stream has begun"
        data = b""
        if decoder.needs_input:
            if not self._fill(1):
                raise DamagedArchiveError(f"it ends inside {self._where()}")
            data, self._rest = self._rest, b""
            self._taken += len(data)
        try:
            found = decoder.decompress(data, size)
        except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
            raise DamagedArchiveError(f"{self._where()} is damaged ({error})") from error
        if decoder.eof:
            self._rest = decoder.unused_data + self._rest
            self._taken -= len(decoder.unused_data)
            self._decoder = None
        return found

    def _where(self) -> str:
        return f"stream {self._number}, which begins at byte {self._start}"
