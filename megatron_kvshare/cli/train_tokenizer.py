"""``kvshare train-tokenizer``: a tokenizer of SentencePiece or Hugging Face from text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from megatron_kvshare.cli.progress import ProgressLine
from megatron_kvshare.config.fields.types import SCHEMA, Count, Index, Seed, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.data.inputs import Inputs
from megatron_kvshare.data.preprocess import OnBadRecord
from megatron_kvshare.data.train_tokenizer import (
    ModelType,
    TokenizerJob,
    TrainedTokenizer,
    train_tokenizer,
)
from megatron_kvshare.errors import Fault
from megatron_kvshare.output import complain

_EXAMPLES = """\
  kvshare train-tokenizer --input books.jsonl.xz more/ --vocab-size 4096 --output tok
  kvshare preprocess --input books.jsonl.xz more/ --output-prefix data/books --append-eod \\
      --tokenizer-model tok.model
  kvshare train-tokenizer --model-type byte-level-bpe --input 'shards/*.parquet' \\
      --vocab-size 32000 --output tok
  kvshare preprocess --tokenizer-type HuggingFaceTokenizer --tokenizer-model tok ...

Input is what `kvshare preprocess` takes: JSON lines, plain text, Parquet, Arrow, data sets, also
compressed. Of much text a random choice is trained on, the same one every time."""

_COVERAGE = 0.9999


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class TrainTokenizerConfig:
    """Train a tokenizer: as Llama's by SentencePiece, or as GPT-2's."""

    input: tuple[str, ...]
    """Files, folders, globs, - for standard input, or data sets of the Hugging Face hub
    (owner/name), as for `kvshare preprocess`; documents may have any length."""
    vocab_size: Count
    """Number of tokens, the 256 bytes and the special ones included."""
    output: str
    """Start of the output names: OUTPUT.model and OUTPUT.vocab; for byte-level-bpe a folder with
    tokenizer.json."""
    model_type: ModelType = "bpe"
    """SentencePiece with byte-pair encoding (bpe) or a unigram model (unigram), or byte-pair
    encoding of bytes as a Hugging Face tokenizer (byte-level-bpe)."""
    json_key: str = "text"
    """Key of the text in JSON lines, column of a table."""
    character_coverage: Annotated[float, Field(gt=0, le=1)] = _COVERAGE
    """SentencePiece: share of the characters that get tokens of their own; the rest is written as
    bytes."""
    max_text_mb: Count = 200
    """Train on a random choice of this much text where there is more: memory stays the same for any
    size of the input."""
    max_sentences: Index = 0
    """Train on a random choice of this many lines; 0: as many as --max-text-mb allows."""
    seed: Seed = 1234
    """Decides the random choice."""
    on_bad_record: OnBadRecord = "stop"
    """What to do with a record that is no document (broken JSON, no text under the key, ...): stop,
    or skip and count it."""
    max_document_mb: Count = 64
    """Longer lines and documents are bad records; their rest is skipped unread."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub."""
    dataset_config: str | None = None
    """Configuration of a data set of the hub."""
    dataset_split: str = "train"
    """Split of a data set."""


@rule("model_type character_coverage")
def coverage_has_a_meaning(config: TrainTokenizerConfig) -> Iterator[Fault]:
    """Bytes leave no character out."""
    coverage = config.character_coverage
    if config.model_type == "byte-level-bpe" and coverage != _COVERAGE:
        rule_text = "--model-type byte-level-bpe writes every character by its bytes"
        yield Fault("--character-coverage", coverage, rule_text, "leave it out")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command = Command(
        "kvshare train-tokenizer",
        "Train a tokenizer.",
        _EXAMPLES,
        rules=(coverage_has_a_meaning,),
    )
    config = parse(TrainTokenizerConfig, argv, command)
    job = TokenizerJob(
        inputs=config.input,
        output=config.output,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        json_key=config.json_key,
        character_coverage=config.character_coverage,
        max_text_bytes=config.max_text_mb * 1_000_000,
        max_sentences=config.max_sentences,
        seed=config.seed,
        skips_bad_records=config.on_bad_record == "skip",
        max_document_bytes=config.max_document_mb * 1_000_000,
        revision=config.revision,
        dataset_config=config.dataset_config,
        dataset_split=config.dataset_split,
    )
    started = time.monotonic()
    trained = train_tokenizer(job, complain, _progress(started))
    print(_trained_on(trained, time.monotonic() - started))
    for reason, number in sorted(trained.bad_records.items()):
        complain(f"warning: {number:,} bad records were left out: {reason}")
    names = " and ".join(map(str, trained.files))
    print(f"wrote {names} ({config.vocab_size:,} tokens)")
    kind = " --tokenizer-type HuggingFaceTokenizer" if trained.model.is_dir() else ""
    print(f"use it with{kind} --tokenizer-model {trained.model}")
    return 0


def _trained_on(trained: TrainedTokenizer, seconds: float) -> str:
    sample = trained.sample
    text = f"trained on {sample.text_bytes / 1e6:.1f} MB of text ({len(sample.pieces):,} lines"
    if sample.is_all:
        return f"{text}) in {seconds:.1f} s"
    return (
        f"{text}, a random choice of {sample.of_pieces:,} with {sample.of_bytes / 1e6:,.1f} MB)"
        f" in {seconds:.1f} s"
    )


def _progress(started: float):
    line = ProgressLine(started)

    def report(inputs: Inputs) -> None:
        total, read = inputs.total_bytes, inputs.bytes_read
        line.show(read / total if total else None, f"{read / 1e6:,.1f} MB read")

    return report
