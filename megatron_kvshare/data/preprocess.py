"""Text to token files: the same ones for any number of workers, and for any number of times that
the run was killed and started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_kvshare import __version__
from megatron_kvshare.data.documents import TextDocuments
from megatron_kvshare.data.encoding import (
    EncoderSettings,
    InnerEnds,
    Skipped,
    encode_all,
)
from megatron_kvshare.data.inputs import MAX_DOCUMENT_BYTES, InputOptions, Inputs, open_inputs
from megatron_kvshare.data.publish import INDEX, NOTES, publish
from megatron_kvshare.data.token_index import token_dtype, write_index
from megatron_kvshare.data.tokenizers import Tokenizer, load_tokenizer
from megatron_kvshare.data.unfinished import KeyCounts, Unfinished
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.ownership.aside import aside, remove_leftovers
from megatron_kvshare.ownership.owner import file_place, owned

_FORMAT = 1
"""Number of the form of unfinished work, and of how documents are found: another one cannot go on
from it."""
_COMMIT_SECONDS = 2.0
_REPORT_SECONDS = 0.2

OnBadRecord = Literal["stop", "skip"]


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
    on_bad_record: OnBadRecord = "stop"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    revision: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    workers: int = 1

    @property
    def file_names(self) -> list[str]:
        """The names of the files of each JSON key; a key may hold what no file name may."""
        return [f"{key.replace('/', '_')}_document" for key in self.json_keys]

    @property
    def prefixes(self) -> list[str]:
        """Prefix of the files of each JSON key, in Megatron's naming."""
        return [f"{self.output_prefix}_{name}" for name in self.file_names]

    @property
    def skipped_path(self) -> Path:
        """Where the first bad records of each kind are shown."""
        return Path(self.output_prefix + ".skipped.jsonl")

    @property
    def input_options(self) -> InputOptions:
        """How the input is read."""
        return InputOptions(
            json_keys=self.json_keys,
            text_documents=self.text_documents,
            max_document_bytes=self.max_document_bytes,
            revision=self.revision,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
        )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, the same in every process."""
        return load_tokenizer(
            self.tokenizer_type,
            self.tokenizer_model,
            self.vocab_size,
            split_special_tokens=self.split_special_tokens,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class Counts:
    """Counts so far. ``skipped``: records that became no document; ``total_bytes`` of the input,
    None where nobody knows; ``resumed_bytes`` were read by runs before this one."""

    total_bytes: int | None
    bytes_read: int
    resumed_bytes: int
    keys: list[KeyCounts]
    skipped_records: Skipped
    inner_ends: InnerEnds

    @property
    def documents(self) -> int:
        """Documents under all keys."""
        return sum(key.documents for key in self.keys)

    @property
    def tokens(self) -> int:
        """Tokens under all keys."""
        return sum(key.tokens for key in self.keys)

    @property
    def text_bytes(self) -> int:
        """Bytes of text in UTF-8 under all keys."""
        return sum(key.text_bytes for key in self.keys)

    @property
    def skipped(self) -> int:
        """Records that became no document."""
        return self.skipped_records.total


Say = Callable[[str], None]
Report = Callable[[Counts], None]


def preprocess(
    job: PreprocessJob, report: Report | None = None, say: Say = lambda _: None
) -> Counts:
    """Tokenize all documents; write ``.bin/.idx`` files and a note of the tokenizer beside them.

    Args:
        job: what to do.
        report: called after every batch.
        say: is told what was found in the input, and whether the run goes on from finished work.

    Returns:
        Final counts.

    Raises:
        DataError: broken input, tokenizer or output folder; results of before are left alone, and
            what is finished is kept for the next start.
        OwnershipError: another process writes the same files.
    """
    _check_names(job)
    inputs = open_inputs(job.inputs, job.input_options)
    for warning in inputs.warnings:
        say(f"warning: {warning}")
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in inputs.kinds().items())
    say(f"input: {kinds}")
    tokenizer = job.load_tokenizer()
    if job.append_eod and tokenizer.eod is None:
        fix = (
            "leave --append-eod out, or use a tokenizer with an end-of-sentence token (Hugging"
            " Face: eos_token in tokenizer_config.json)"
        )
        raise DataError(Fault("--append-eod", "on", "the tokenizer names no such token", fix))
    try:
        with owned(*(file_place("--output-prefix", p) for p in (job.output_prefix, *job.prefixes))):
            return _Run(job, inputs, tokenizer, report, say).run()
    except OSError as error:
        fix = "give a folder that can be written and has room"
        rule = f"cannot be written ({error})"
        raise DataError(Fault("--output-prefix", job.output_prefix, rule, fix)) from error


def _check_names(job: PreprocessJob) -> None:
    names = job.file_names
    if len(set(names)) < len(names):
        rule = f"two keys would write the same files ({', '.join(names)})"
        raise DataError(Fault("--json-keys", " ".join(job.json_keys), rule, "give other keys"))


class _Run:
    """One run, which owns its results."""

    def __init__(
        self,
        job: PreprocessJob,
        inputs: Inputs,
        tokenizer: Tokenizer,
        report: Report | None,
        say: Say,
    ) -> None:
        self.job, self.inputs, self.tokenizer = job, inputs, tokenizer
        self.report, self.say = report, say
        self.dtype = token_dtype(tokenizer.vocab_size)
        for path in (
            Path(prefix) for prefix in job.prefixes
        ):  # of runs before there was such a folder
            remove_leftovers(path.parent, re.escape(path.name) + r"\.(bin|idx|meta\.json)")
        self.work = Unfinished(job.output_prefix, job.file_names, self._name(), self.dtype.itemsize)
        self.resumed_bytes = 0

    def _name(self) -> str:
        """What decides the results, in short."""
        job = replace(
            self.job,
            inputs=(),
            output_prefix="",
            tokenizer_model=None,
            on_bad_record="stop",
            workers=1,
        )
        parts = [
            _FORMAT,
            asdict(job),
            self.tokenizer.fingerprint,
            self.tokenizer.eod,
            self.inputs.identity(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self) -> Counts:
        """Do what is left to do."""
        with ExitStack() as stack:
            stack.callback(self.work.close)
            self._begin()
            if not self.work.progress.is_complete:
                self.work.open()
                self._encode()
                self._complete()
            self._publish()
        return self._counts()

    def _begin(self) -> None:
        work, skipped = self.work, self.work.progress.skipped
        if work.is_resumed and skipped.bad and self.job.on_bad_record == "stop":
            rule = f"the work begun there has left out {skipped.bad:,} bad records"
            fix = f"give --on-bad-record skip to go on with it, or remove {work.folder}"
            raise DataError(Fault("--on-bad-record", "stop", rule, fix))
        if work.is_resumed:
            found = self._counts()
            counts = f"{found.documents:,} documents and {found.tokens:,} tokens"
            self.say(f"going on from {work.folder}: {counts} are finished")
        elif work.replaces_other:
            self.say(f"{work.folder} was work on something else; beginning anew")

    def _encode(self) -> None:
        job, tokenizer = self.job, self.tokenizer
        settings = EncoderSettings(
            load=partial(_load, job),
            keys=job.json_keys,
            max_document_bytes=job.max_document_bytes,
            dtype=self.dtype.name,
            eod=tokenizer.eod,
            append_eod=job.append_eod,
        )
        pieces = self.inputs.pieces(self.work.progress.position)
        self.resumed_bytes = self.inputs.bytes_before(self.work.progress.position)
        committed = reported = time.monotonic()
        for encoded in encode_all(settings, pieces, job.workers, tokenizer):
            if encoded.bad is not None and job.on_bad_record == "stop":
                raise encoded.bad.error(skippable=True)
            self.work.write(encoded)
            now = time.monotonic()
            if self.report is not None and now - reported > _REPORT_SECONDS:
                self.report(self._counts())
                reported = now
            if now - committed > _COMMIT_SECONDS:
                self.work.commit()
                committed = time.monotonic()
        if self.report is not None:
            self.report(self._counts())

    def _complete(self) -> None:
        """Write what belongs to the tokens."""
        self.work.commit()
        for number, (prefix, counts) in enumerate(
            zip(self.job.prefixes, self.work.progress.keys, strict=True)
        ):
            if not counts.tokens:
                self.work.is_committed = False
                fix = "give files with text (see --json-keys and --text-documents)"
                raise DataError(Fault("--input", prefix, "the input holds no text", fix))
            index = self.work.path(number, INDEX)
            sha256 = write_index(index, self.dtype, self.work.lengths(number))
            notes = self._notes(counts) | {"index_sha256": sha256}
            text = json.dumps(notes, indent=1) + "\n"
            self.work.path(number, NOTES).write_text(text, encoding="utf-8")
        self.work.progress.is_complete = True
        self.work.commit()

    def _publish(self) -> None:
        """Give the files their names, all complete."""
        self.work.close()
        for number, prefix in enumerate(self.job.prefixes):
            publish(self.work.results(number), prefix)
        path, examples = self.job.skipped_path, self.work.progress.skipped.examples
        if examples:
            remove_leftovers(path.parent, re.escape(path.name))
            written = aside(path)
            lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
            written.write_text("".join(lines), encoding="utf-8")
            os.replace(written, path)
        else:
            path.unlink(missing_ok=True)
        self.work.remove()

    def _counts(self) -> Counts:
        progress = self.work.progress
        return Counts(
            total_bytes=self.inputs.total_bytes,
            bytes_read=self.inputs.bytes_read,
            resumed_bytes=self.resumed_bytes,
            keys=progress.keys,
            skipped_records=progress.skipped,
            inner_ends=progress.inner_ends,
        )

    def _notes(self, counts: KeyCounts) -> dict[str, object]:
        job, tokenizer = self.job, self.tokenizer
        model = Path(job.tokenizer_model).name if job.tokenizer_model else None
        return {
            "tokenizer_type": job.tokenizer_type,
            "tokenizer_model": model,
            "tokenizer_sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "append_eod": job.append_eod,
            "split_special_tokens": job.split_special_tokens,
            "kvshare_version": __version__,
            "input": self.inputs.kinds(),
            "documents": counts.documents,
            "tokens": counts.tokens,
            "text_bytes": counts.text_bytes,
            "skipped": dict(self.work.progress.skipped.counts),
        }


def _load(job: PreprocessJob) -> Tokenizer:
    return job.load_tokenizer()
