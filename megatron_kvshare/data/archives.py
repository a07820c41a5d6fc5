"""Compressed files, to their last byte: xz, gzip, bzip2 and Zstandard, of one or more streams.

The readers of Python's library end at the first thing behind a stream that is not another one, or
that is a damaged one, and call it the end of the file. Here every byte belongs to a stream, or to
padding that the format allows, or is an error that says where it lies.

What a file is, its first bytes say; its name does not count.
"""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

_CHUNK = 1 << 16
_XZ_MEMORY = 256 << 20
"""Bytes a decoder may take: `xz -9` asks for 65 MB, a crafted header for gigabytes."""
_ZSTD_PIECE = 1 << 9
"""Bytes asked for at once: where one is damaged, the whole piece is lost."""


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


class Source(Protocol):
    """What bytes are read from; fewer than asked for may come, none only at the end."""

    def read(self, size: int, /) -> bytes | None: ...


class _Format(NamedTuple):
    """``padding``: zero bytes may follow a stream, in multiples of this; 0: none may."""

    name: str
    magic: bytes
    decoder: Callable[[], _Decoder]
    padding: int


_FORMATS = {
    ".xz": _Format(
        "xz", b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY), 4
    ),
    ".gz": _Format("gzip", b"\x1f\x8b", _GzipDecoder, 1),
    ".bz2": _Format("bzip2", b"BZh", bz2.BZ2Decompressor, 0),
}
_BY_NAME = {form.name: form for form in _FORMATS.values()}
ZSTD = "Zstandard"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""Begin of a frame of Zstandard that holds no data; some tools write one in front."""
SUFFIXES = {suffix: form.name for suffix, form in _FORMATS.items()} | {".zst": ZSTD, ".zstd": ZSTD}
"""How names of compressed files end, and in which format."""

_OTHERS = {
    b"\x04\x22\x4d\x18": ("LZ4", "decompress it first (lz4 -d)"),
    b"\x1f\x9d": ("compress (.Z)", "decompress it first (gzip -d)"),
    b"PK\x03\x04": ("zip", "unpack it first (unzip)"),
    b"PK\x05\x06": ("zip", "unpack it first (unzip)"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "unpack it first"),
    b"Rar!\x1a\x07": ("RAR", "unpack it first"),
    b"Obj\x01": ("Avro", "write its text as .jsonl first"),
    b"ORC": ("ORC", "write its text as .jsonl first"),
    b"%PDF-": ("PDF", "extract its text first"),
    b"SQLite format 3\0": ("SQLite", "write its text as .jsonl first"),
    b"\x93NUMPY": ("NumPy", "give text"),
    b"\x89PNG\r\n": ("PNG", "give text"),
    b"\xff\xd8\xff": ("JPEG", "give text"),
    b"\x7fELF": ("program", "give text"),
    b"MMIDIDX\0\0": ("Megatron index", "give text; such files are for --data-path"),
}
_TAR = (257, b"ustar")


class Foreign(NamedTuple):
    """A kind of file that is not read, and what to do with one."""

    name: str
    fix: str


def compression(head: bytes) -> str | None:
    """The format of a compressed file by its first bytes (at least 10 of them)."""
    if head.startswith(_ZSTD_MAGIC) or _ZSTD_SKIPPED.match(head):
        return ZSTD
    for name, form in _BY_NAME.items():
        if head.startswith(form.magic) and (name != "bzip2" or head[4:10] in _BZIP2_STARTS):
            return name
    return None


_BZIP2_STARTS = (b"1AY&SY", b"\x17rE8P\x90")
"""What follows the magic and the level in bzip2: a block, or the end of an empty stream."""


def foreign(head: bytes) -> Foreign | None:
    """The kind of a file that is not read, by its first bytes (at least 300 of them)."""
    at, magic = _TAR
    if head[at : at + len(magic)] == magic:
        return Foreign("tar", "unpack it first (tar -xf)")
    for magic, (name, fix) in _OTHERS.items():
        if head.startswith(magic) and (name != "ORC" or b"\0" in head[:64]):
            return Foreign(name, fix)
    return None


def decompressed(name: str, file: Source) -> io.RawIOBase:
    """The content of a compressed file of format ``name``.

    Reading raises :class:`DamagedArchiveError`, after all that could be read before the damage.
    """
    return _Zstandard(file) if name == ZSTD else _Streams(file, _BY_NAME[name])


class _Zstandard(io.RawIOBase):
    """Arrow's decoder: it reads frame after frame, misses none, and refuses what is none."""

    def __init__(self, file: Source) -> None:
        import pyarrow

        self._errors = (OSError, pyarrow.ArrowException)
        self._inner = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        self._found = 0
        self._damage: DamagedArchiveError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        filled = 0
        while filled < len(view) and self._damage is None:
            try:
                data = self._inner.read(min(len(view) - filled, _ZSTD_PIECE))
            except self._errors as error:
                where = f"behind {self._found + filled} bytes of its content"
                self._damage = DamagedArchiveError(f"it is damaged or cut off {where} ({error})")
                break
            if not data:
                break
            view[filled : filled + len(data)] = data
            filled += len(data)
        self._found += filled
        if self._damage is not None and not filled:
            raise self._damage
        return filled


class _Streams(io.RawIOBase):
    """All streams of a file, one after another."""

    def __init__(self, file: Source, form: _Format) -> None:
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
