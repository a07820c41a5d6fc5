"""Train a tokenizer on text of any shape and size.

SentencePiece models have Llama 2's settings: unknown characters as bytes, digits one by one, text
kept as it is (no normalisation), ids 0 unknown, 1 begin, 2 end. Byte-level byte-pair encoding is
GPT-2's, with its pattern of words; id 0 ends documents. The same input gives the same files, byte
for byte.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_kvshare.data.documents import BadRecord, Document
from megatron_kvshare.data.inputs import MAX_DOCUMENT_BYTES, InputOptions, Inputs, open_inputs
from megatron_kvshare.data.text_sample import (
    MAX_SENTENCE_BYTES,
    Sample,
    cut_sentences,
    cut_stream,
    draw_sample,
)
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.ownership.aside import aside, remove_leftovers
from megatron_kvshare.ownership.owner import file_place, owned

ModelType = Literal["bpe", "unigram", "byte-level-bpe"]
END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_MOST_BLANK_LINES = 3


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """What to train a tokenizer on. ``inputs``, ``json_key``, ``max_document_bytes`` and the three
    of data sets: as in :mod:`megatron_kvshare.data.inputs`."""

    inputs: tuple[str, ...]
    output: str
    vocab_size: int
    model_type: ModelType = "bpe"
    json_key: str = "text"
    character_coverage: float = 0.9999
    max_text_bytes: int = 200_000_000
    """Of more text a random choice is taken."""
    max_sentences: int = 0
    """Train on a random choice of this many lines; 0: as many as ``max_text_bytes`` allows."""
    seed: int = 1234
    skips_bad_records: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    revision: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"

    @property
    def input_options(self) -> InputOptions:
        """How its input is read."""
        return InputOptions(
            json_keys=(self.json_key,),
            text_documents="line",
            max_document_bytes=self.max_document_bytes,
            revision=self.revision,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
        )


@dataclass(frozen=True)
class TrainedTokenizer:
    """``model``: the file or folder to give as ``--tokenizer-model``; ``files``: all that was
    written; ``sample``: what it was trained on; ``bad_records``: that were left out, by reason."""

    model: Path
    files: tuple[Path, ...]
    sample: Sample
    bad_records: Mapping[str, int] = field(default_factory=dict)


def train_tokenizer(
    job: TokenizerJob,
    say: Callable[[str], None] = lambda _: None,
    report: Callable[[Inputs], None] = lambda _: None,
) -> TrainedTokenizer:
    """Train and write ``OUTPUT.model`` and ``OUTPUT.vocab``, or for byte-level byte-pair encoding
    ``OUTPUT/tokenizer.json`` with its settings; each file appears complete or not at all.

    Args:
        job: what to do.
        say: is told what the input was taken for.
        report: is told after every document how far the input has been read.

    Raises:
        DataError: broken or empty input, a vocabulary that does not fit the text, an unwritable
            folder.
        OwnershipError: another process writes the same files.
    """
    _check(job)
    inputs = open_inputs(job.inputs, job.input_options)
    for warning in inputs.warnings:
        say(f"warning: {warning}")
    bad: Counter[str] = Counter()
    documents = _documents(job, inputs, bad, report)
    if _is_byte_level(job):
        pieces = cut_stream(_with_blank_lines(documents))
    else:
        pieces = (piece for each in documents for piece in cut_sentences(each.texts[0]))
    try:
        with owned(file_place("--output", job.output)):
            sample = draw_sample(pieces, job.max_text_bytes, job.max_sentences or None, job.seed)
            if not any(piece.strip() for piece in sample.pieces):
                fix = "give files with text (see --json-key)"
                name = " ".join(job.inputs)
                raise DataError(Fault("--input", name, "the input holds no text", fix))
            contents = _byte_level(job, sample) if _is_byte_level(job) else _subwords(job, sample)
            for path, content in contents.items():
                _write(path, content)
    except OSError as error:
        fix = "give a folder that can be written"
        rule = f"cannot be written ({error})"
        raise DataError(Fault("--output", job.output, rule, fix)) from error
    files = tuple(contents)
    model = Path(job.output) if _is_byte_level(job) else files[0]
    return TrainedTokenizer(model, files, sample, bad)


def _is_byte_level(job: TokenizerJob) -> bool:
    return job.model_type == "byte-level-bpe"


def _check(job: TokenizerJob) -> None:
    """Before any text is read."""
    least = _BYTES + 1
    if _is_byte_level(job) and job.vocab_size < least:
        rule = "the 256 bytes and the end of a text alone need more"
        fix = f"use --vocab-size of at least {least}"
        raise DataError(Fault("--vocab-size", job.vocab_size, rule, fix))


def _documents(
    job: TokenizerJob, inputs: Inputs, bad: Counter[str], report: Callable[[Inputs], None]
) -> Iterator[Document]:
    for record in inputs.records():
        if not isinstance(record, BadRecord):
            yield record
        elif job.skips_bad_records:
            bad[record.reason] += 1
        else:
            raise record.error(skippable=True)
        report(inputs)


def _with_blank_lines(documents: Iterable[Document]) -> Iterator[str]:
    """Texts, and those of blank lines between lines of a file, which are no documents: to a
    tokenizer of bytes they are text as well."""
    file, number = "", 0
    for document in documents:
        if document.file == file:
            yield from [""] * min(document.number - number - 1, _MOST_BLANK_LINES)
        file, number = document.file, document.number
        yield document.texts[0]


def _subwords(job: TokenizerJob, sample: Sample) -> dict[Path, bytes]:
    """The files of a SentencePiece model."""
    buffer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sample.pieces),
            model_writer=buffer,
            vocab_size=job.vocab_size,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            max_sentence_length=MAX_SENTENCE_BYTES,
            character_coverage=job.character_coverage,
            model_type=job.model_type,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # Written into the model: any other choice would depend on the machine.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _refused(job, str(error)) from error
    content = buffer.getvalue()
    vocabulary = _vocabulary_text(SentencePieceProcessor(model_proto=content)).encode()
    return {Path(job.output + ".model"): content, Path(job.output + ".vocab"): vocabulary}


def _refused(job: TokenizerJob, message: str) -> DataError:
    """The trainer's refusal in the user's terms."""
    rule = f"SentencePiece refused: {message.strip()}"
    fix = "check the input text and the flags"
    if high := re.search(r"too high.*<= (\d+)", message):
        rule = "the text is too short for so many tokens"
        fix = f"use --vocab-size {high[1]} or more text"
    elif low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        rule = "bytes and single characters alone need more"
        fix = f"use --vocab-size of at least {low[1]}"
    return DataError(Fault("--vocab-size", job.vocab_size, rule, fix))


def _vocabulary_text(processor: SentencePieceProcessor) -> str:
    ids = range(processor.get_piece_size())
    return "".join(f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in ids)


def _byte_level(job: TokenizerJob, sample: Sample) -> dict[Path, bytes]:
    """The files of a Hugging Face tokenizer."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        rule, fix = "it needs the extra `hf`", "pip install 'megatron-kvshare[hf]'"
        raise DataError(Fault("--model-type", job.model_type, rule, fix)) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=job.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample.pieces, trainer, length=len(sample.pieces))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size < job.vocab_size:
        rule, fix = "the text is too short for so many tokens", f"use --vocab-size {size}"
        fix = f"{fix} or more text"
        raise DataError(Fault("--vocab-size", job.vocab_size, rule, fix))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(job.output)
    return {
        folder / "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
        folder / "tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode(),
    }


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name))
    partial = aside(path)
    partial.write_bytes(content)
    os.replace(partial, path)
