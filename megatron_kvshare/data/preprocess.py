"""Text to token files in parallel.

Workers parse and tokenize batches of documents; the parent writes them in input order. So the files
are the same for every number of workers, and memory is bounded by a few batches (or the longest
document) per worker.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy

from megatron_kvshare.data.documents import BadRecord, Piece, TextDocuments, records
from megatron_kvshare.data.inputs import MAX_DOCUMENT_BYTES, InputOptions, open_inputs
from megatron_kvshare.data.publish import INDEX, NOTES, TOKENS, publish
from megatron_kvshare.data.tokenizers import Tokenizer, load_tokenizer
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.ownership.aside import aside, remove_leftovers
from megatron_kvshare.ownership.owner import file_place, owned

_BATCH_BYTES = 1 << 19
_BATCHES_PER_WORKER = 3


@dataclass(frozen=True, kw_only=True)
class PreprocessJob:
    """What to turn into token files, and how."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    trust_remote_code: bool = False
    vocab_size: int | None = None
    json_keys: tuple[str, ...] = ("text",)
    text_documents: TextDocuments = "file"
    append_eod: bool = False
    split_special_tokens: bool = False
    workers: int = 1

    @property
    def prefixes(self) -> list[str]:
        """Prefix of the files of each JSON key, in Megatron's naming."""
        return [f"{self.output_prefix}_{key}_document" for key in self.json_keys]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, the same in every process."""
        return load_tokenizer(
            self.tokenizer_type,
            self.tokenizer_model,
            self.vocab_size,
            split_special_tokens=self.split_special_tokens,
            trust_remote_code=self.trust_remote_code,
        )


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
class Counts:
    """Counts so far; documents without text are skipped."""

    total_bytes: int
    bytes_read: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    inner_ends: InnerEnds = field(default_factory=InnerEnds)


class _Encoded(NamedTuple):
    """One batch under one key: its token ids in a row, the length of each document (0: no text)."""

    ids: numpy.ndarray
    lengths: numpy.ndarray
    inner_ends: InnerEnds


@dataclass(frozen=True)
class _Encoder:
    """Turns documents into token ids; ``eod`` is found once, by the parent."""

    job: PreprocessJob
    tokenizer: Tokenizer
    eod: int | None

    def encode(self, batch: Sequence[Piece]) -> list[_Encoded]:
        rows: list[list[list[int]]] = [[] for _ in self.job.json_keys]
        inner_ends = [InnerEnds() for _ in self.job.json_keys]
        keys = self.job.json_keys
        for record in (
            each for piece in batch for each in records(piece, keys, MAX_DOCUMENT_BYTES)
        ):
            if isinstance(record, BadRecord):
                raise record.error()
            document = record
            for row, found, text in zip(rows, inner_ends, document.texts, strict=True):
                ids = self.tokenizer.encode(text) if text.strip() else []
                if self.eod in ids:
                    found.add(InnerEnds(ids.count(self.eod), 1, document.where))
                if ids and self.job.append_eod and self.eod is not None:
                    ids.append(self.eod)
                row.append(ids)
        return [
            _Encoded(
                numpy.concatenate([numpy.array(ids, dtype=numpy.int32) for ids in row]),
                numpy.array([len(ids) for ids in row], dtype=numpy.int64),
                found,
            )
            for row, found in zip(rows, inner_ends, strict=True)
        ]


@dataclass
class _Outputs:
    """Files under temporary names, one pair per key."""

    job: PreprocessJob
    tokenizer: Tokenizer
    totals: list[Counts] = field(default_factory=list)

    def __post_init__(self) -> None:
        from megatron_kvshare.megatron_api.datasets import TokenFileWriter

        Path(self.job.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        size = self.tokenizer.vocab_size
        self.partial = [_aside(prefix) for prefix in self.job.prefixes]
        self.writers = [TokenFileWriter(files[TOKENS], size) for files in self.partial]
        self.totals = [Counts(total_bytes=0) for _ in self.job.prefixes]

    def write(self, batch: Sequence[_Encoded], progress: Counts) -> None:
        for encoded, writer, total in zip(batch, self.writers, self.totals, strict=True):
            ends = numpy.cumsum(encoded.lengths)
            for length, end in zip(encoded.lengths.tolist(), ends.tolist(), strict=True):
                if length:
                    writer.add_document(encoded.ids[end - length : end])
            written = int((encoded.lengths > 0).sum())
            total.documents += written
            total.tokens += int(encoded.ids.size)
            progress.documents += written
            progress.tokens += int(encoded.ids.size)
            progress.skipped += len(encoded.lengths) - written
            progress.inner_ends.add(encoded.inner_ends)

    def finish(self) -> None:
        """Give the files their names, all complete."""
        every = zip(self.job.prefixes, self.partial, self.writers, self.totals, strict=True)
        for prefix, files, writer, total in every:
            if not total.tokens:
                fix = "give files with text (see --json-keys and --text-documents)"
                raise DataError(Fault("--input", prefix, "the input holds no text", fix))
            writer.finalize(files[INDEX])
            with files[INDEX].open("rb") as index:
                sha256 = hashlib.file_digest(index, "sha256").hexdigest()
            notes = _notes(self.job, self.tokenizer, total) | {"index_sha256": sha256}
            files[NOTES].write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        for prefix, files in zip(self.job.prefixes, self.partial, strict=True):
            publish(files, prefix)

    def discard(self) -> None:
        """Remove what is left under temporary names."""
        for files, writer in zip(self.partial, self.writers, strict=True):
            writer.close()
            for path in files.values():
                path.unlink(missing_ok=True)


def preprocess(job: PreprocessJob, report: Callable[[Counts], None] | None = None) -> Counts:
    """Tokenize all documents; write ``.bin/.idx`` files and a note of the tokenizer beside them.

    Args:
        job: what to do.
        report: called after every batch.

    Returns:
        Final counts.

    Raises:
        DataError: broken input, tokenizer or output folder; nothing is left behind then.
        OwnershipError: another process writes the same files.
    """
    options = InputOptions(json_keys=job.json_keys, text_documents=job.text_documents)
    reader = open_inputs(job.inputs, options)
    tokenizer = job.load_tokenizer()
    if job.append_eod and tokenizer.eod is None:
        fix = (
            "leave --append-eod out, or use a tokenizer with an end-of-sentence token (Hugging"
            " Face: eos_token in tokenizer_config.json)"
        )
        raise DataError(Fault("--append-eod", "on", "the tokenizer names no such token", fix))
    encoder = _Encoder(job, tokenizer, tokenizer.eod)
    progress = Counts(total_bytes=reader.total_bytes or 0)
    try:
        with ExitStack() as stack:
            stack.enter_context(owned(*(file_place("--output-prefix", p) for p in job.prefixes)))
            outputs = _Outputs(job, tokenizer)
            stack.callback(outputs.discard)
            for encoded in _encode_all(encoder, _batches(reader.pieces()), stack):
                outputs.write(encoded, progress)
                progress.bytes_read = reader.bytes_read
                if report is not None:
                    report(progress)
            outputs.finish()
    except BrokenProcessPool as error:
        rule = "a worker process was killed, most likely for lack of memory"
        raise DataError(Fault("--workers", job.workers, rule, "use fewer workers")) from error
    except OSError as error:
        fix = "give a folder that can be written and has room"
        rule = f"cannot be written ({error})"
        raise DataError(Fault("--output-prefix", job.output_prefix, rule, fix)) from error
    return progress


def _batches(documents: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(
    encoder: _Encoder, batches: Iterator[list[Piece]], stack: ExitStack
) -> Iterator[list[_Encoded]]:
    """Encoded batches in input order, with a bounded number of them in flight."""
    job = encoder.job
    if job.workers == 1:
        yield from map(encoder.encode, batches)
        return
    # Fresh processes: the parent has loaded libraries with threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    arguments = (job, encoder.eod)
    pool = ProcessPoolExecutor(job.workers, context, initializer=_start_worker, initargs=arguments)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    waiting: deque[Future[list[_Encoded] | tuple[Fault, ...]]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode_in_worker, batch))
        if len(waiting) >= _BATCHES_PER_WORKER * job.workers:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


_worker: _Encoder | None = None


def _start_worker(job: PreprocessJob, eod: int | None) -> None:
    global _worker
    _worker = _Encoder(job, job.load_tokenizer(), eod)


def _encode_in_worker(batch: list[Piece]) -> list[_Encoded] | tuple[Fault, ...]:
    """Encode, or hand back the faults: an exception would lose them between processes."""
    assert _worker is not None, "the pool runs _start_worker first"
    try:
        return _worker.encode(batch)
    except DataError as error:
        return error.faults


def _result(future: Future[list[_Encoded] | tuple[Fault, ...]]) -> list[_Encoded]:
    result = future.result()
    if isinstance(result, tuple):
        raise DataError(result)
    return result


def _notes(job: PreprocessJob, tokenizer: Tokenizer, total: Counts) -> dict[str, object]:
    model = Path(job.tokenizer_model).name if job.tokenizer_model else None
    return {
        "tokenizer_type": job.tokenizer_type,
        "tokenizer_model": model,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": job.append_eod,
        "split_special_tokens": job.split_special_tokens,
        "documents": total.documents,
        "tokens": total.tokens,
    }


def _aside(prefix: str) -> dict[str, Path]:
    """By suffix, where the files are written; what killed runs were writing goes."""
    targets = {suffix: Path(prefix + suffix) for suffix in (TOKENS, INDEX, NOTES)}
    for target in targets.values():
        remove_leftovers(target.parent, re.escape(target.name))
    return {suffix: aside(target) for suffix, target in targets.items()}
