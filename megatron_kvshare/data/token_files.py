"""Checks of ``.bin/.idx`` token files before megatron-core opens them."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy

from megatron_kvshare.data.publish import INDEX, NOTES, TOKENS
from megatron_kvshare.data.token_index import REPROCESS, TokenIndex, broken, read_index

_SCAN_TOKENS = 16_000_000
_SCAN_BLOCKS = 64


class Scan(NamedTuple):
    """The smallest and the largest token id met, and whether the one looked for was met."""

    smallest: int
    largest: int
    found: bool


@dataclass(frozen=True)
class TokenFiles:
    """Sound token files: their index, and what preprocess noted."""

    prefix: str
    index: TokenIndex
    bin_bytes: int
    notes: dict[str, object]

    @property
    def num_documents(self) -> int:
        """Documents in the files."""
        return int(self.index.lengths.size)

    @cached_property  # of each part of the data, and it reads up to 64 MB
    def fingerprint(self) -> str:
        """Short name of the tokens: changes with the length of any document and with any token, in
        large files with any token of 64 evenly spaced blocks. The rest of the index has a name of
        its own, ``index.sha256``."""
        tokens = 0
        for block in self._blocks():
            tokens = zlib.crc32(block.tobytes(), tokens)
        return f"{zlib.crc32(self.index.lengths.tobytes()):08x}-{tokens:08x}-{self.bin_bytes}"

    def count_tokens(self, first: int, end: int) -> int:
        """Tokens in the documents ``[first, end)``."""
        return int(self.index.lengths[first:end].sum(dtype=numpy.int64))

    def scan(self, token: int | None) -> Scan:
        """Look through the token ids: all of them, or 64 evenly spaced blocks of a large file."""
        blocks = self._blocks()
        return Scan(
            min(int(block.min()) for block in blocks),
            max(int(block.max()) for block in blocks),
            token is not None and any(bool((block == token).any()) for block in blocks),
        )

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
        return numpy.memmap(self.prefix + TOKENS, dtype=self.index.dtype, mode="r")

    def _blocks(self) -> list[numpy.ndarray]:
        ids = self._ids()
        if ids.size <= _SCAN_TOKENS:
            return [ids]
        width = _SCAN_TOKENS // _SCAN_BLOCKS
        starts = numpy.linspace(0, ids.size - width, _SCAN_BLOCKS, dtype=numpy.int64)
        return [ids[start : start + width] for start in starts]


def notes_path(prefix: str) -> Path:
    """Where ``kvshare preprocess`` notes the tokenizer; stock files come without it."""
    return Path(prefix + NOTES)


def open_checked(prefix: str) -> TokenFiles:
    """Check the two files at ``prefix`` against each other, and against preprocess's notes.

    Raises:
        DataError: missing, empty, unreadable, foreign, damaged or mismatched files.
    """
    try:
        bin_bytes = _file_size(prefix, TOKENS)
        _file_size(prefix, INDEX)
        index = read_index(prefix, bin_bytes)
        notes = _read_notes(prefix)
    except OSError as error:
        raise broken(
            prefix, f"the files cannot be read ({error})", "check path and rights"
        ) from error
    if notes.get("index_sha256", index.sha256) != index.sha256:
        name = notes_path(prefix).name
        rule = f".idx is not the one that {name} was written with"
        raise broken(prefix, rule, f"{REPROCESS}, or remove {name} if they come from elsewhere")
    return TokenFiles(prefix, index, bin_bytes, notes)


def _file_size(prefix: str, suffix: str) -> int:
    path = Path(prefix + suffix)
    if path.is_file():
        size = path.stat().st_size
        if size == 0:
            raise broken(prefix, f"{path.name} is empty", REPROCESS)
        return size
    if suffix == INDEX:  # tokens are looked for first
        rule = f"there is no file {path}, as when `kvshare preprocess` is stopped at its very end"
        raise broken(prefix, rule, REPROCESS)
    raise broken(prefix, f"there is no file {path}", _other_prefix(prefix))


def _other_prefix(prefix: str) -> str:
    bare = prefix.removesuffix(".bin").removesuffix(".idx")
    for candidate in (bare, bare + "_text_document"):
        if candidate != prefix and Path(candidate + ".idx").is_file():
            return f"pass the prefix {candidate}"
    return "pass the prefix of files made by `kvshare preprocess`, without .bin or .idx"


def _read_notes(prefix: str) -> dict[str, object]:
    path = notes_path(prefix)
    if not path.is_file():
        return {}
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise broken(
            prefix, f"{path.name} is not JSON ({error})", f"remove it, or {REPROCESS}"
        ) from error
    return notes if isinstance(notes, dict) else {}
