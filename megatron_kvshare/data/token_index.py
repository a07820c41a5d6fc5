"""The whole index of token files: checked once when it is read, and written.

Layout of ``.idx`` (megatron-core's ``indexed_dataset.py``): 9 bytes magic, version (u64), dtype
code (u8), number of sequences and of document borders (u64 each), then lengths (i32), byte offsets
(i64) and borders (i64); multimodal files add a mode (i8) per sequence. megatron-core believes all
of it: a wrong offset trains on other tokens without a word.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_kvshare.data.publish import INDEX
from megatron_kvshare.errors import DataError, Fault

REPROCESS = "make the files again with `kvshare preprocess`"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CODES = {name: code for code, name in _DTYPES.items()}
_MAX_SEQUENCES = (1 << 31) - 1
"""megatron-core numbers documents in 32 bits."""
_CHUNK = 1 << 20
_TWO_BYTES = 65_500


@dataclass(frozen=True)
class TokenIndex:
    """A sound index: type of the ids, tokens of every document (int32), SHA-256 of the file.

    A document here is what megatron-core's GPT data calls one, a sequence of the file. ``starts``
    (int64): the byte of ``.bin`` that each begins with; ``borders`` (int64): at which of them the
    file itself says that one ends, from 0.
    """

    dtype: numpy.dtype
    lengths: numpy.ndarray
    starts: numpy.ndarray
    borders: numpy.ndarray
    sha256: str

    @property
    def is_plain(self) -> bool:
        """Whether the file says that every document is one sequence."""
        steps = (
            numpy.array_equal(part, numpy.arange(first, first + part.size))
            for first, part in _chunks(self.borders)
        )
        return self.borders.size == self.lengths.size + 1 and all(steps)


def read_index(prefix: str, bin_bytes: int) -> TokenIndex:
    """Read ``.idx`` whole, and check that it describes ``.bin`` of ``bin_bytes`` byte for byte.

    Raises:
        DataError: another kind of file, a damaged index, or one that belongs to other tokens.
        OSError: it cannot be read.
    """
    path = Path(prefix + INDEX)
    content = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    if content.size < _HEADER.size:
        raise broken(prefix, f"{path.name} is cut off", REPROCESS)
    magic, version, code, sequences, borders = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise broken(prefix, f"{path.name} is not a Megatron index of token ids", REPROCESS)
    _check_size(prefix, content.size, sequences, borders)
    lengths = _column(content, "<i4", sequences, _HEADER.size)
    pointers = _column(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    ends = _column(content, "<i8", borders, _HEADER.size + 12 * sequences)
    dtype = numpy.dtype(_DTYPES[code])
    _check_lengths(prefix, lengths, dtype.itemsize, bin_bytes)
    _check_pointers(prefix, lengths, pointers, dtype.itemsize)
    _check_borders(prefix, ends, sequences)
    return TokenIndex(dtype, lengths, pointers, ends, hashlib.sha256(content).hexdigest())


def token_dtype(vocab_size: int) -> numpy.dtype:
    """How token ids are stored: in 2 bytes below 65,500 of them, else in 4, as megatron-core does
    (``DType.optimal_dtype``)."""
    return numpy.dtype("uint16" if vocab_size < _TWO_BYTES else "int32")


def write_index(
    path: Path,
    dtype: numpy.dtype,
    *lengths: numpy.ndarray,
    borders: Sequence[numpy.ndarray] | None = None,
) -> str:
    """Write an index byte for byte as megatron-core's ``IndexedDatasetBuilder`` does.

    Args:
        path: the file.
        dtype: type of the token ids.
        lengths: tokens of every document (int32, may be mapped from a file), in pieces.
        borders: after which of them the file says that a document ends, in pieces, from 0; None:
            after each.

    Returns:
        SHA-256 of the file.
    """
    count = sum(piece.size for piece in lengths)
    ends = [numpy.arange(count + 1)] if borders is None else borders
    sha256 = hashlib.sha256()
    with path.open("wb") as file:

        def write(content: bytes) -> None:
            file.write(content)
            sha256.update(content)

        size = sum(piece.size for piece in ends)
        write(_HEADER.pack(_MAGIC, 1, _CODES[dtype.name], count, size))
        for piece in lengths:
            for _, part in _chunks(piece):
                write(part.astype("<i4").tobytes())
        start = 0
        for piece in lengths:
            for _, starts in _starts(piece, dtype.itemsize):
                write((start + starts).astype("<i8").tobytes())
            start += int(piece.sum(dtype=numpy.int64)) * dtype.itemsize
        for piece in ends:
            for _, part in _chunks(piece):
                write(part.astype("<i8").tobytes())
    return sha256.hexdigest()


def broken(prefix: str, rule: str, fix: str) -> DataError:
    """The error of token files that cannot be used."""
    return DataError(Fault(where="token files", value=prefix, rule=rule, fix=fix))


def _column(content: numpy.ndarray, dtype: str, count: int, offset: int) -> numpy.ndarray:
    return numpy.frombuffer(content, dtype=dtype, count=count, offset=offset)


def _check_size(prefix: str, size: int, sequences: int, borders: int) -> None:
    name, expected = f"{Path(prefix).name}.idx", _HEADER.size + 12 * sequences + 8 * borders
    if size < expected:
        raise broken(prefix, f"{name} is cut off: {size} of {expected} bytes", REPROCESS)
    if sequences and size == expected + sequences:
        rule = f"{name} gives every sequence a mode: these are multimodal files"
        raise broken(prefix, rule, "only text is supported; give files of token ids alone")
    if size > expected:
        rule = f"{name} has {size - expected} bytes after its {expected}"
        raise broken(prefix, rule, REPROCESS)
    if sequences > _MAX_SEQUENCES:
        rule = f"{sequences:,} documents are more than megatron-core can number"
        raise broken(prefix, rule, f"cut the files into parts of at most {_MAX_SEQUENCES:,}")


def _check_lengths(prefix: str, lengths: numpy.ndarray, width: int, bin_bytes: int) -> None:
    if lengths.size and int(lengths.min()) < 0:
        number = int((lengths < 0).argmax())
        rule = f".idx is damaged: document {number} has {int(lengths[number])} tokens"
        raise broken(prefix, rule, REPROCESS)
    expected = int(lengths.sum(dtype=numpy.int64)) * width
    if expected != bin_bytes:
        rule = f".idx describes {expected} bytes of tokens, .bin has {bin_bytes}"
        raise broken(prefix, rule, f"{REPROCESS}, the two do not belong together")


def _check_pointers(
    prefix: str, lengths: numpy.ndarray, pointers: numpy.ndarray, width: int
) -> None:
    """Documents lie one after another: each starts where the one before it ends."""
    for first, expected in _starts(lengths, width):
        found = pointers[first : first + expected.size]
        if not numpy.array_equal(found, expected):
            number = int((found != expected).argmax())
            rule = (
                f".idx is damaged: document {first + number} starts at byte {int(found[number])}"
                f" of .bin, after those before it at {int(expected[number])}"
            )
            raise broken(prefix, rule, REPROCESS)


def _chunks(column: numpy.ndarray) -> Iterator[tuple[int, numpy.ndarray]]:
    """Number of the first entry of each chunk, and the chunk."""
    for first in range(0, column.size, _CHUNK):
        yield first, column[first : first + _CHUNK]


def _starts(lengths: numpy.ndarray, width: int) -> Iterator[tuple[int, numpy.ndarray]]:
    """The first document of each chunk, and the byte at which each of its documents starts."""
    start = 0
    for first, part in _chunks(lengths):
        sizes = part.astype(numpy.int64) * width
        ends = start + numpy.cumsum(sizes)
        yield first, ends - sizes
        start = int(ends[-1])


def _check_borders(prefix: str, ends: numpy.ndarray, sequences: int) -> None:
    rises = ends.size > 0 and ends[0] == 0 and ends[-1] == sequences
    if not rises or bool((ends[1:] < ends[:-1]).any()):
        rule = f".idx is damaged: its document borders do not rise from 0 to {sequences}"
        raise broken(prefix, rule, REPROCESS)
