"""Documents that are the same token for token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy

from megatron_kvshare.data.corpus import MANY_DOCUMENTS, Corpus

_DIGEST_BYTES = 16
_BATCH_BYTES = 64 << 20

Report = Callable[[int], None]
"""Is told the number of documents that have been worked on."""


class Duplicates(NamedTuple):
    """``first``: for every document whether none before it has the same tokens; ``groups``: how
    many different documents occur more than once."""

    first: numpy.ndarray
    groups: int


def find_duplicates(corpus: Corpus, report: Report = lambda _: None) -> Duplicates:
    """Compare all documents by a BLAKE2 hash of 128 bits; takes 40 bytes of memory for each."""
    digests = numpy.empty((corpus.num_documents, 2), numpy.uint64)
    done = 0
    for lengths, tokens in corpus.batches(in_order(corpus.num_documents), _BATCH_BYTES):
        content = memoryview(tokens.view(numpy.uint8))
        width = corpus.dtype.itemsize
        ends = (numpy.cumsum(lengths, dtype=numpy.int64) * width).tolist()
        joined = b"".join(
            hashlib.blake2b(content[start:end], digest_size=_DIGEST_BYTES).digest()
            for start, end in zip([0, *ends], ends, strict=False)
        )
        digests[done : done + lengths.size] = numpy.frombuffer(joined, numpy.uint64).reshape(-1, 2)
        done += lengths.size
        report(done)
    return _first_of_each(digests)


def _first_of_each(digests: numpy.ndarray) -> Duplicates:
    order = numpy.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    ordered = digests[order]
    again = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = numpy.ones(order.size, bool)
    first[order[1:][again]] = False
    starts = again & ~numpy.concatenate([[False], again[:-1]]) if again.size else again
    return Duplicates(first, int(starts.sum()))


def in_order(count: int) -> Iterator[numpy.ndarray]:
    """The numbers of all documents, in pieces."""
    for first in range(0, count, MANY_DOCUMENTS):
        yield numpy.arange(first, min(first + MANY_DOCUMENTS, count))
