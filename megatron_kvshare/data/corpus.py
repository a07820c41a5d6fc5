"""Several pairs of token files as one row of documents, read in any order in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy

from megatron_kvshare.data.publish import INDEX, TOKENS
from megatron_kvshare.data.token_files import TokenFiles, open_checked
from megatron_kvshare.errors import DataError, Fault

MANY_DOCUMENTS = 1 << 20
"""Documents whose numbers are worked on at a time."""


class Corpus:
    """Documents 0, 1, ... of all ``files``, one after another; ``dtype`` holds the ids of each."""

    def __init__(self, files: Sequence[TokenFiles]) -> None:
        self.files = list(files)
        self.dtype = numpy.result_type(*(each.index.dtype for each in files))
        self._firsts = numpy.cumsum([0, *(each.num_documents for each in files)])

    @property
    def num_documents(self) -> int:
        """Of all files."""
        return int(self._firsts[-1])

    @cached_property
    def lengths(self) -> numpy.ndarray:
        """Tokens of every document, int32; of a single pair of files mapped from its index."""
        every = [each.index.lengths for each in self.files]
        return every[0] if len(every) == 1 else numpy.concatenate(every)

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int(self.lengths.sum(dtype=numpy.int64))

    def batches(
        self, order: Iterator[numpy.ndarray], most_bytes: int
    ) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
        """Lengths and tokens of documents in an order, as many at a time as have ``most_bytes``
        together, and at least one.

        Args:
            order: numbers of documents, in pieces.
            most_bytes: what the tokens of a batch may take.
        """
        with ExitStack() as stack:
            readers = [stack.enter_context(_Reader(each)) for each in self.files]
            for piece in order:
                start = 0
                ends = numpy.cumsum(self.lengths[piece], dtype=numpy.int64) * self.dtype.itemsize
                while start < piece.size:
                    limit = most_bytes + (int(ends[start - 1]) if start else 0)
                    end = max(int(numpy.searchsorted(ends, limit, "right")), start + 1)
                    documents = piece[start:end]
                    yield self.lengths[documents], self._gather(readers, documents)
                    start = end

    def _gather(self, readers: Sequence[_Reader], documents: numpy.ndarray) -> numpy.ndarray:
        """The tokens of ``documents`` in this order; read from the files in theirs, documents that
        follow one another in both at once."""
        lengths = self.lengths[documents].astype(numpy.int64)
        starts = numpy.cumsum(lengths) - lengths
        tokens = numpy.empty(int(lengths.sum()), self.dtype)
        places = numpy.argsort(documents, kind="stable")
        numbers = documents[places]
        follows = (numpy.diff(numbers) == 1) & (numpy.diff(places) == 1)
        follows &= ~numpy.isin(numbers[1:], self._firsts)  # the next file
        runs = numpy.flatnonzero(numpy.concatenate([[True], ~follows]))
        files = numpy.searchsorted(self._firsts, numbers[runs], "right") - 1
        local = numbers[runs] - self._firsts[files]
        begin = starts[places[runs]]
        end = begin + numpy.add.reduceat(lengths[places], runs)
        for number, document, first, last in zip(
            files.tolist(), local.tolist(), begin.tolist(), end.tolist(), strict=True
        ):
            readers[number].read_into(tokens[first:last], document)
        return tokens


class _Reader:
    """Reads tokens of one file without mapping it, so that what was read takes no memory."""

    def __init__(self, files: TokenFiles) -> None:
        self._dtype = files.index.dtype
        self._starts = files.index.starts
        self._prefix = files.prefix

    def __enter__(self) -> _Reader:
        self._handle = os.open(self._prefix + TOKENS, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def read_into(self, target: numpy.ndarray, document: int) -> None:
        """Fill ``target`` with the tokens from the start of ``document`` on."""
        position, tokens = int(self._starts[document]), target
        if tokens.dtype != self._dtype:
            tokens = numpy.empty(target.size, self._dtype)
        rest = memoryview(tokens.view(numpy.uint8))
        while rest:
            count = os.preadv(self._handle, [rest], position)
            if not count:
                rule, fix = "the file has become shorter", "start again when nothing writes to it"
                raise DataError(Fault("token files", self._prefix, rule, fix))
            rest, position = rest[count:], position + count
        if tokens is not target:
            target[:] = tokens


def open_corpus(inputs: Sequence[str]) -> Corpus:
    """Open and check token files, by prefix or by the folder that all pairs of are meant.

    Raises:
        DataError: with all faults of all files; different tokenizers.
    """
    prefixes = [prefix for word in inputs for prefix in _prefixes(word)]
    files: list[TokenFiles] = []
    faults: list[Fault] = []
    for prefix in prefixes:
        try:
            files.append(open_checked(prefix))
        except DataError as error:
            faults += error.faults
    twice = sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1})
    faults += [Fault("--input", prefix, "it is given twice", "give it once") for prefix in twice]
    faults += _other_tokenizers(files)
    if faults:
        raise DataError(faults)
    return Corpus(files)


def _prefixes(word: str) -> list[str]:
    if os.path.isfile(word + INDEX) or not os.path.isdir(word):
        return [word]  # training keeps its index of samples in a folder of the prefix's name
    found = sorted(str(path)[: -len(INDEX)] for path in Path(word).glob("*" + INDEX))
    if not found:
        fix = "give prefixes of .bin/.idx files, or the folder they lie in"
        raise DataError(Fault("--input", word, "the folder holds no .idx files", fix))
    return found


def _other_tokenizers(files: Sequence[TokenFiles]) -> Iterator[Fault]:
    known = [each for each in files if each.notes.get("tokenizer_sha256")]
    for each in known[1:]:
        name = "tokenizer_sha256"
        if each.notes[name] != known[0].notes[name]:
            rule = f"it was made with another tokenizer than {known[0].prefix}"
            fix = "preprocess the text of one of them again"
            yield Fault("--input", each.prefix, rule, fix)
