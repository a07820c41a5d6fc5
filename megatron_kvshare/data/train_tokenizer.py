"""Train a SentencePiece tokenizer on text of any shape.

Settings are Llama 2's: byte-pair encoding, unknown characters as bytes, digits one by one, text
kept as it is (no normalisation), ids 0 unknown, 1 begin, 2 end. The same input gives the same
model, byte for byte.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_kvshare.data.inputs import InputOptions, Inputs, open_inputs
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.ownership.aside import aside, remove_leftovers
from megatron_kvshare.ownership.owner import file_place, owned

MAX_SENTENCE_BYTES = 4192
"""SentencePiece's trainer leaves out longer lines without an error."""

_SENTENCE_ENDS = (b". ", b"! ", b"? ", b"; ")


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """What to train a tokenizer on."""

    inputs: tuple[str, ...]
    output: str
    vocab_size: int
    json_key: str = "text"
    character_coverage: float = 0.9999
    max_sentences: int = 0
    """Train on a random choice of this many lines; 0: on all."""


@dataclass(frozen=True)
class TrainedTokenizer:
    """Files written, and what the trainer saw."""

    model: Path
    vocab: Path
    sentences: int
    text_bytes: int


def train_tokenizer(job: TokenizerJob) -> TrainedTokenizer:
    """Train and write ``OUTPUT.model`` and ``OUTPUT.vocab``; each appears complete or not at all.

    Raises:
        DataError: broken or empty input, a vocabulary that does not fit the text, an unwritable
        folder.
        OwnershipError: another process writes the same files.
    """
    options = InputOptions(json_keys=(job.json_key,), text_documents="line")
    sentences = _Sentences(open_inputs(job.inputs, options))
    files = Path(job.output + ".model"), Path(job.output + ".vocab")
    buffer = io.BytesIO()
    try:
        with owned(file_place("--output", job.output)):
            SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=buffer,
                vocab_size=job.vocab_size,
                input_sentence_size=job.max_sentences,
                shuffle_input_sentence=job.max_sentences > 0,
                max_sentence_length=MAX_SENTENCE_BYTES,
                character_coverage=job.character_coverage,
                model_type="bpe",
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
            content = buffer.getvalue()
            _write(files[0], content)
            _write(files[1], _vocabulary_text(SentencePieceProcessor(model_proto=content)).encode())
    except OSError as error:
        if sentences.fault is None:
            fix = "give a folder that can be written"
            rule = f"cannot be written ({error})"
            raise DataError(Fault("--output", job.output, rule, fix)) from error
        raise sentences.fault from error
    except RuntimeError as error:
        raise sentences.fault or _refused(job, sentences, str(error)) from error
    return TrainedTokenizer(*files, sentences.count, sentences.text_bytes)


def cut_sentences(text: str, limit: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """Cut text into lines of at most ``limit`` bytes of UTF-8, losing nothing but line breaks and
    border spaces.

    Lines are cut after the end of a sentence if there is one, else at a space, else between two
    characters.
    """
    for line in text.split("\n"):
        content = line.encode("utf-8")
        start = 0
        while len(content) - start > limit:
            cut = _border(content, start, start + limit)
            yield content[start:cut].decode("utf-8")
            start = cut + (content[cut : cut + 1] == b" ")
        if start < len(content):
            yield content[start:].decode("utf-8")


def _border(content: bytes, start: int, end: int) -> int:
    sentence = max(content.rfind(mark, start, end) for mark in _SENTENCE_ENDS)
    if sentence > start:
        return sentence + 1
    space = content.rfind(b" ", start, end)
    if space > start:
        return space
    while content[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


class _Sentences:
    """Feeds the trainer, and keeps the error if there is one: C++ lets only its text through."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.count = 0
        self.text_bytes = 0
        self.fault: DataError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self.inputs.documents():
                text = document.texts[0]
                self.text_bytes += len(text.encode("utf-8"))
                for sentence in cut_sentences(text):
                    self.count += 1
                    yield sentence
        except DataError as error:
            self.fault = error
            raise


def _refused(job: TokenizerJob, sentences: _Sentences, message: str) -> DataError:
    """The trainer's refusal in the user's terms."""
    if not sentences.count:
        fix = "give files with text (see --json-key)"
        return DataError(Fault("--input", " ".join(job.inputs), "the input holds no text", fix))
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


def _write(path: Path, content: bytes) -> None:
    remove_leftovers(path.parent, re.escape(path.name))
    partial = aside(path)
    partial.write_bytes(content)
    os.replace(partial, path)
