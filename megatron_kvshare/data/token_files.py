"""Checks of ``.bin/.idx`` token files before megatron-core opens them (L4).

Layout of ``.idx`` (megatron-core's ``indexed_dataset.py``): 9 bytes magic, version (u64), dtype
code (u8), number of sequences and of document borders (u64 each), then lengths (i32), byte offsets
(i64) and borders (i64).
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy

from megatron_kvshare.errors import DataError, Fault

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_REPROCESS = "make the files again with `kvshare preprocess`"
_SCAN_TOKENS = 16_000_000
_SCAN_BLOCKS = 64


@dataclass(frozen=True)
class TokenFiles:
    """Sound token files: tokens of every document (int32), and what preprocess noted."""

    prefix: str
    dtype: str
    lengths: numpy.ndarray
    bin_bytes: int
    notes: dict[str, object]

    @property
    def num_documents(self) -> int:
        """Documents in the files."""
        return int(self.lengths.size)

    @cached_property  # of each part of the data, and it reads up to 64 MB
    def fingerprint(self) -> str:
        """Short name of the content: changes with the length of any document and with any token, in
        large files with any token of 64 evenly spaced blocks."""
        tokens = 0
        for block in self._blocks():
            tokens = zlib.crc32(block.tobytes(), tokens)
        return f"{zlib.crc32(self.lengths.tobytes()):08x}-{tokens:08x}-{self.bin_bytes}"

    def count_tokens(self, first: int, end: int) -> int:
        """Tokens in the documents ``[first, end)``."""
        return int(self.lengths[first:end].sum(dtype=numpy.int64))

    def scan(self, token: int | None) -> tuple[int, bool]:
        """Look through the token ids: all of them, or 64 evenly spaced blocks of a large file.

        Returns:
            The largest id met, and whether ``token`` was met.
        """
        blocks = self._blocks()
        largest = max(int(block.max()) for block in blocks)
        return largest, token is not None and any(bool((block == token).any()) for block in blocks)

    def unigram_entropy(self) -> float:
        """Nats per token: the loss of a model that knows only how frequent each token is.

        Counted over all tokens, or over 64 evenly spaced blocks of a large file.
        """
        counts = numpy.bincount(numpy.concatenate(self._blocks()))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * numpy.log(shares)).sum())

    def tokens(self, first: int, end: int) -> numpy.ndarray:
        """The token ids of documents ``[first, end)``, one after another, mapped from the file."""
        start = self.count_tokens(0, first)
        return self._ids()[start : start + self.count_tokens(first, end)]

    def _ids(self) -> numpy.ndarray:
        # Read as unsigned, so that a negative id of a foreign file is outside every vocabulary.
        dtype = numpy.dtype(f"u{numpy.dtype(self.dtype).itemsize}")
        return numpy.memmap(self.prefix + ".bin", dtype=dtype, mode="r")

    def _blocks(self) -> list[numpy.ndarray]:
        ids = self._ids()
        if ids.size <= _SCAN_TOKENS:
            return [ids]
        width = _SCAN_TOKENS // _SCAN_BLOCKS
        starts = numpy.linspace(0, ids.size - width, _SCAN_BLOCKS, dtype=numpy.int64)
        return [ids[start : start + width] for start in starts]


def notes_path(prefix: str) -> Path:
    """Where ``kvshare preprocess`` notes the tokenizer; stock files come without it."""
    return Path(prefix + ".meta.json")


def open_checked(prefix: str) -> TokenFiles:
    """Check the two files at ``prefix`` against each other.

    Raises:
        DataError: missing, empty, unreadable, foreign or mismatched files.
    """
    try:
        bin_bytes = _file_size(prefix, ".bin")
        idx_bytes = _file_size(prefix, ".idx")
        dtype, lengths = _read_index(prefix, idx_bytes)
        notes = _read_notes(prefix)
    except OSError as error:
        raise _broken(
            prefix, f"the files cannot be read ({error})", "check path and rights"
        ) from error
    expected = int(lengths.sum(dtype=numpy.int64)) * numpy.dtype(dtype).itemsize
    if (lengths.size and int(lengths.min()) < 0) or expected != bin_bytes:
        rule = f".idx describes {expected} bytes of tokens, .bin has {bin_bytes}"
        raise _broken(prefix, rule, f"{_REPROCESS}, the two do not belong together")
    if not expected:
        raise _broken(prefix, "the files hold no tokens", "preprocess an input that contains text")
    return TokenFiles(prefix, dtype, lengths, bin_bytes, notes)


def _file_size(prefix: str, suffix: str) -> int:
    path = Path(prefix + suffix)
    if path.is_file():
        size = path.stat().st_size
        if size == 0:
            raise _broken(prefix, f"{path.name} is empty", _REPROCESS)
        return size
    raise _broken(prefix, f"there is no file {path}", _other_prefix(prefix))


def _other_prefix(prefix: str) -> str:
    bare = prefix.removesuffix(".bin").removesuffix(".idx")
    for candidate in (bare, bare + "_text_document"):
        if candidate != prefix and Path(candidate + ".idx").is_file():
            return f"pass the prefix {candidate}"
    return "pass the prefix of files made by `kvshare preprocess`, without .bin or .idx"


def _read_index(prefix: str, idx_bytes: int) -> tuple[str, numpy.ndarray]:
    path = Path(prefix + ".idx")
    with path.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise _broken(prefix, f"{path.name} is cut off", _REPROCESS)
    magic, version, code, sequences, borders = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise _broken(prefix, f"{path.name} is not a Megatron index of token ids", _REPROCESS)
    if idx_bytes < _HEADER.size + 12 * sequences + 8 * borders:
        raise _broken(prefix, f"{path.name} is cut off", _REPROCESS)
    lengths = (
        numpy.memmap(path, dtype=numpy.int32, mode="r", offset=_HEADER.size, shape=(sequences,))
        if sequences
        else numpy.zeros(0, dtype=numpy.int32)
    )
    return _DTYPES[code], lengths


def _read_notes(prefix: str) -> dict[str, object]:
    path = notes_path(prefix)
    if not path.is_file():
        return {}
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(
            prefix, f"{path.name} is not JSON ({error})", f"remove it, or {_REPROCESS}"
        ) from error
    return notes if isinstance(notes, dict) else {}


def _broken(prefix: str, rule: str, fix: str) -> DataError:
    return DataError(Fault(where="token files", value=prefix, rule=rule, fix=fix))
