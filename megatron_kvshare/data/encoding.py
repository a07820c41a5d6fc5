"""Pieces of input to token ids, in this process or in several.

Workers get pieces of input, not files: one large file keeps all of them busy, as many small ones
do. What comes back keeps the order of the input, whatever their number.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy

from megatron_kvshare.data.documents import (
    BadRecord,
    Document,
    Piece,
    Position,
    Reason,
    records,
)
from megatron_kvshare.data.tokenizers import Tokenizer
from megatron_kvshare.errors import DataError, Fault

_TASK_BYTES = 1 << 18
_TASK_PIECES = 1_000
_BYTES_PER_WORKER = 1 << 20
"""Text that waits for a worker or is in its hands; one document more where it is longer."""
EXAMPLES = 10
"""Bad records of each kind that are kept to be shown."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How documents become token ids. ``load`` makes the tokenizer, the same in every process;
    ``eod`` is found once, by the parent (None: no document is ended)."""

    load: Callable[[], Tokenizer]
    keys: tuple[str, ...]
    max_document_bytes: int
    dtype: str
    eod: int | None
    append_eod: bool


@dataclass
class InnerEnds:
    """End-of-document tokens inside documents, written there as text: how many, in how many
    documents, and where the first of these is."""

    tokens: int = 0
    documents: int = 0
    first: str | None = None

    def add(self, other: InnerEnds) -> None:
        self.tokens += other.tokens
        self.documents += other.documents
        self.first = self.first or other.first


@dataclass
class Skipped:
    """Records that became no document: how many for each reason, and the first ones."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, object]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    @property
    def bad(self) -> int:
        """Those that are more than empty."""
        return self.total - self.counts.get(Reason.EMPTY, 0)

    def note(self, record: BadRecord) -> None:
        """Count a record, and keep it if few of its kind are kept."""
        self._keep(
            {
                "reason": str(record.reason),
                "file": record.file,
                "line": record.number,
                "rule": record.rule,
                "text": record.value,
            }
        )
        self._count(str(record.reason), 1)

    def add(self, other: Skipped) -> None:
        """Count those that come after."""
        for example in other.examples:
            self._keep(example)
        for reason, number in other.counts.items():
            self._count(reason, number)

    def _count(self, reason: str, number: int) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + number

    def _keep(self, example: dict[str, object]) -> None:
        if sum(kept["reason"] == example["reason"] for kept in self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class EncodedKey:
    """The documents of a batch under one key: their ids in a row, and the length of each."""

    ids: numpy.ndarray
    lengths: numpy.ndarray
    text_bytes: int


@dataclass
class Encoded:
    """A batch of input after its pieces up to ``end``; ``bad``: the first bad record."""

    keys: list[EncodedKey]
    skipped: Skipped
    inner_ends: InnerEnds
    bad: BadRecord | None
    end: Position


class Encoder:
    """Turns pieces of input into token ids."""

    def __init__(self, settings: EncoderSettings, tokenizer: Tokenizer) -> None:
        self.settings, self.tokenizer = settings, tokenizer

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        """Encode all documents of some pieces."""
        settings = self.settings
        skipped, ends = Skipped(), InnerEnds()
        documents: list[Document] = []
        bad = None
        for piece in pieces:
            for record in records(piece, settings.keys, settings.max_document_bytes):
                if isinstance(record, BadRecord):
                    bad = bad or record
                    skipped.note(record)
                else:
                    documents.append(record)
        keys = [
            self._encode_key(number, documents, skipped, ends)
            for number in range(len(settings.keys))
        ]
        return Encoded(keys, skipped, ends, bad, pieces[-1].end)

    def _encode_key(
        self, number: int, documents: Sequence[Document], skipped: Skipped, ends: InnerEnds
    ) -> EncodedKey:
        chosen = []
        for document in documents:
            if document.texts[number].strip():
                chosen.append(document)
            else:
                key = self.settings.keys[number]
                rule = f"there is no text under {key!r}"
                skipped.note(BadRecord(Reason.EMPTY, document.file, document.number, rule))
        texts = [document.texts[number] for document in chosen]
        rows: list[numpy.ndarray] = []
        lengths, size = [], 0
        eod, append = self.settings.eod, self.settings.append_eod
        end = numpy.array([eod] if append and eod is not None else [], dtype=numpy.int32)
        for document, text, ids in zip(
            chosen, texts, self.tokenizer.encode_batch(texts), strict=True
        ):
            if not ids.size:
                rule = "the tokenizer finds no token in it"
                skipped.note(BadRecord(Reason.EMPTY, document.file, document.number, rule))
                continue
            if eod is not None and (inner := int(numpy.count_nonzero(ids == eod))):
                ends.add(InnerEnds(inner, 1, document.where))
            rows += [ids, end]
            lengths.append(ids.size + end.size)
            size += len(text) if text.isascii() else len(text.encode("utf-8"))
        row = numpy.concatenate(rows) if rows else numpy.empty(0)
        return EncodedKey(
            row.astype(self.settings.dtype),
            numpy.array(lengths, dtype=numpy.int32),
            size,
        )


def encode_all(
    settings: EncoderSettings, pieces: Iterable[Piece], workers: int, tokenizer: Tokenizer
) -> Iterator[Encoded]:
    """Encoded batches in the order of the input.

    Args:
        settings: how to encode.
        pieces: the input.
        workers: processes; 1: this one, with ``tokenizer``.

    Raises:
        DataError: a worker was killed.
    """
    # Processes do it: `tokenizers` would start a thread for every core in each of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tasks = _tasks(pieces)
    if workers == 1:
        yield from map(Encoder(settings, tokenizer).encode, tasks)
        return
    with ExitStack() as stack:
        # Fresh processes: the parent has libraries with threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, _start_worker, (settings,))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        waiting: deque[tuple[int, Future[Encoded | tuple[Fault, ...]]]] = deque()
        held, room = 0, workers * _BYTES_PER_WORKER
        try:
            for task in tasks:
                size = sum(piece.size for piece in task)
                while waiting and held + size > room:
                    freed, future = waiting.popleft()
                    held -= freed
                    yield _result(future)
                waiting.append((size, pool.submit(_encode_in_worker, task)))
                held += size
                while waiting and waiting[0][1].done():
                    freed, future = waiting.popleft()
                    held -= freed
                    yield _result(future)
            while waiting:
                yield _result(waiting.popleft()[1])
        except BrokenProcessPool as error:
            rule = "a worker process was killed, most likely for lack of memory"
            fix = "start it again, with fewer workers: it goes on from what is finished"
            raise DataError(Fault("--workers", workers, rule, fix)) from error


def _tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    task: list[Piece] = []
    size = 0
    for piece in pieces:
        task.append(piece)
        size += piece.size
        if size >= _TASK_BYTES or len(task) >= _TASK_PIECES:
            yield task
            task, size = [], 0
    if task:
        yield task


_worker: Encoder | None = None


def _start_worker(settings: EncoderSettings) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Encoder(settings, settings.load())


def _end_with_parent() -> None:
    """A parent that is killed closes no queue, and a worker would wait at it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    parent.join()
    os._exit(1)


def _encode_in_worker(task: Sequence[Piece]) -> Encoded | tuple[Fault, ...]:
    """Encode, or hand back the faults: an exception would lose them between processes."""
    assert _worker is not None, "the pool runs _start_worker first"
    try:
        return _worker.encode(task)
    except DataError as error:
        return error.faults


def _result(future: Future[Encoded | tuple[Fault, ...]]) -> Encoded:
    result = future.result()
    if isinstance(result, tuple):
        raise DataError(result)
    return result
