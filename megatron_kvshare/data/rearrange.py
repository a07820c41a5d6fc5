"""Token files from token files: merged, split and shuffled, without equal documents if wanted.

What is written is complete or not there, byte for byte what megatron-core's builder writes of the
same documents, and the same on every machine, whatever the memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_kvshare.config.blend import Shares
from megatron_kvshare.data.corpus import MANY_DOCUMENTS, Corpus
from megatron_kvshare.data.duplicates import Report, find_duplicates, in_order
from megatron_kvshare.data.publish import INDEX, NOTES, TOKENS, publish
from megatron_kvshare.data.token_index import write_index
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.megatron_api.datasets import split_ranges
from megatron_kvshare.ownership.aside import aside, remove_leftovers
from megatron_kvshare.ownership.owner import file_place, owned

_IDENTITY = (
    "tokenizer_type",
    "tokenizer_model",
    "tokenizer_sha256",
    "vocab_size",
    "eod",
    "append_eod",
    "split_special_tokens",
)
"""What the notes beside token files say of the tokens; the rest is of these files and no others."""
_BATCH_BYTES = 64 << 20
_BYTES_PER_DOCUMENT = 64
"""What the number, place and length of a document take while it is sorted and read."""


@dataclass(frozen=True)
class Made:
    """One pair of files that was written."""

    prefix: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Result:
    """All that was written; ``left_out``: documents that were equal to one before them."""

    made: list[Made]
    left_out: int = 0


def merge(
    corpus: Corpus, prefix: str, dedup: bool = False, report: Report = lambda _: None
) -> Result:
    """All documents, one file after another.

    Raises:
        DataError: files that do not fit together, or an output that cannot be written.
        OwnershipError: another process writes the same files.
    """
    if dedup:
        kept = _kept(corpus, dedup, report)
        made = _write(corpus, prefix, _of(kept), kept.size, report)
        return Result([made], corpus.num_documents - kept.size)
    borders = [numpy.zeros(1, numpy.int64)]
    first = 0
    for files in corpus.files:
        borders.append(files.index.borders[1:] + first)
        first += files.num_documents
    order = in_order(corpus.num_documents)
    return Result([_write(corpus, prefix, order, corpus.num_documents, report, borders)])


def split(
    corpus: Corpus,
    prefix: str,
    shares: Shares,
    dedup: bool = False,
    report: Report = lambda _: None,
) -> Result:
    """The documents that ``--split`` gives to each part, as files ``PREFIX_train``,
    ``PREFIX_valid`` and ``PREFIX_test``; of parts without documents none.

    Raises:
        DataError, OwnershipError: as :func:`merge`.
    """
    kept = _kept(corpus, dedup, report)
    made = []
    for part, (first, end) in split_ranges(shares, kept.size).items():
        if first < end:
            mine = kept[first:end]
            written = _write(corpus, f"{prefix}_{part.name}", _of(mine), mine.size, report)
            made.append(written)
    return Result(made, corpus.num_documents - kept.size)


def shuffle(
    corpus: Corpus,
    prefix: str,
    seed: int,
    most_bytes: int,
    dedup: bool = False,
    report: Report = lambda _: None,
) -> Result:
    """All documents in an order that depends on ``seed`` and their number alone.

    Every document gets a random number of 64 bits, and they are written in the order of these: as
    many at a time as fit into ``most_bytes``, so the files are gone through that many times.

    Raises:
        DataError, OwnershipError: as :func:`merge`.
    """
    keep = find_duplicates(corpus, report).first if dedup else None
    kept = corpus.num_documents if keep is None else int(keep.sum())
    needed = corpus.num_tokens * corpus.dtype.itemsize
    needed = max(needed, corpus.num_documents * _BYTES_PER_DOCUMENT)
    order = _random_order(corpus.num_documents, seed, -(-needed // most_bytes), keep)
    made = _write(corpus, prefix, order, kept, report, most_bytes=most_bytes)
    return Result([made], corpus.num_documents - kept)


def _random_order(
    count: int, seed: int, passes: int, keep: numpy.ndarray | None
) -> Iterator[numpy.ndarray]:
    """Numbers below ``count`` in a random order, those of equal shares of the keys at a time."""
    width = -(-(1 << 64) // max(passes, 1))
    for number in range(max(passes, 1)):
        found = []
        low, high = number * width, min((number + 1) * width, 1 << 64) - 1
        for piece, documents in enumerate(in_order(count)):
            # A generator of its own for each piece: numpy keeps the raw numbers of Philox for ever.
            keys = numpy.random.Philox(key=[seed, piece]).random_raw(documents.size)
            chosen = (keys >= numpy.uint64(low)) & (keys <= numpy.uint64(high))
            if keep is not None:
                chosen &= keep[documents[0] : documents[0] + documents.size]
            found.append((keys[chosen], documents[chosen]))
        keys, documents = (numpy.concatenate(parts) for parts in zip(*found, strict=True))
        yield documents[numpy.argsort(keys, kind="stable")]


def _kept(corpus: Corpus, dedup: bool, report: Report) -> numpy.ndarray:
    """Numbers of the documents that stay."""
    if not dedup:
        return numpy.arange(corpus.num_documents)
    return numpy.flatnonzero(find_duplicates(corpus, report).first)


def _of(documents: numpy.ndarray) -> Iterator[numpy.ndarray]:
    for first in range(0, documents.size, MANY_DOCUMENTS):
        yield documents[first : first + MANY_DOCUMENTS]


def _write(
    corpus: Corpus,
    prefix: str,
    order: Iterator[numpy.ndarray],
    count: int,
    report: Report,
    borders: Sequence[numpy.ndarray] | None = None,
    most_bytes: int = _BATCH_BYTES,
) -> Made:
    """Write ``count`` documents in an order. ``borders``: as in the index; None: one document per
    sequence, which must be so in all files."""
    _check(corpus, prefix, count, whole=borders is not None)
    lengths: list[numpy.ndarray] = []
    written = 0
    try:
        with _new_files(prefix) as files:
            with files[TOKENS].open("wb") as tokens_file:
                for sizes, tokens in corpus.batches(order, most_bytes):
                    tokens_file.write(memoryview(tokens.view(numpy.uint8)))
                    lengths.append(sizes)
                    written += sizes.size
                    report(written)
            assert written == count
            tokens_written = sum(int(sizes.sum(dtype=numpy.int64)) for sizes in lengths)
            sha256 = write_index(files[INDEX], corpus.dtype, *lengths, borders=borders)
            counts = {"documents": count, "tokens": tokens_written, "index_sha256": sha256}
            notes = _common_notes(corpus) | counts
            files[NOTES].write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        fix = "give a folder that can be written and has room"
        rule = f"it cannot be written ({error})"
        raise DataError(Fault("--output-prefix", prefix, rule, fix)) from error
    return Made(prefix, count, tokens_written)


def _check(corpus: Corpus, prefix: str, count: int, whole: bool) -> None:
    inputs = {Path(files.prefix + TOKENS).resolve() for files in corpus.files}
    if Path(prefix + TOKENS).resolve() in inputs:
        rule, fix = "it would replace what it is made of", "give another prefix"
        raise DataError(Fault("--output-prefix", prefix, rule, fix))
    if not count:
        rule, fix = "there are no documents", "give files with documents"
        names = " ".join(files.prefix for files in corpus.files)
        raise DataError(Fault("--input", names, rule, fix))
    if whole:
        return
    several = [files.prefix for files in corpus.files if not files.index.is_plain]
    if several:
        rule = "its documents have several sequences, or none, which only a merge keeps together"
        fix = "make it again with `kvshare preprocess`, which writes a document as one sequence"
        raise DataError([Fault("--input", name, rule, fix) for name in several])


def _common_notes(corpus: Corpus) -> dict[str, object]:
    """What the notes of all inputs agree in; nothing, where one has none."""
    first, *others = (files.notes for files in corpus.files)
    return {
        name: first[name]
        for name in _IDENTITY
        if name in first and all(name in each and each[name] == first[name] for each in others)
    }


def differing_notes(corpus: Corpus) -> list[str]:
    """What the notes of the inputs do not agree in, and so the output has none of."""
    common = _common_notes(corpus)
    return [
        name
        for name in _IDENTITY
        if name not in common and any(name in files.notes for files in corpus.files)
    ]


@contextmanager
def _new_files(prefix: str) -> Iterator[Mapping[str, Path]]:
    """By suffix where to write files that get their names at the end, all complete."""
    with owned(file_place("--output-prefix", prefix)):
        targets = {suffix: Path(prefix + suffix) for suffix in (TOKENS, INDEX, NOTES)}
        for target in targets.values():
            remove_leftovers(target.parent, re.escape(target.name))
        files = {suffix: aside(target) for suffix, target in targets.items()}
        try:
            yield files
            publish(files, prefix)
        finally:
            for path in files.values():
                path.unlink(missing_ok=True)
