"""``kvshare train-tokenizer``: a SentencePiece tokenizer from jsonl or plain text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from megatron_kvshare.config.fields.types import SCHEMA, Count, Index, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.data.train_tokenizer import TokenizerJob, train_tokenizer

_EXAMPLES = """\
  kvshare train-tokenizer --input books.jsonl.xz --vocab-size 4096 --output tok
  kvshare preprocess --input books.jsonl.xz --output-prefix data/books --append-eod \\
      --tokenizer-model tok.model

Input may be .jsonl (one JSON object per line) or plain text, also compressed (.xz, .gz, .bz2)."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class TrainTokenizerConfig:
    """Train a tokenizer as Llama's: byte-pair encoding, bytes for unknown characters."""

    input: tuple[str, ...]
    """Files: .jsonl or plain text, also .xz, .gz or .bz2; documents may have any length."""
    vocab_size: Count
    """Number of tokens, the 256 bytes and the 3 special ones included."""
    output: str
    """Start of the output names: OUTPUT.model and OUTPUT.vocab."""
    json_key: str = "text"
    """Key of the text in .jsonl."""
    character_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9999
    """Share of the characters that get tokens of their own; the rest is written as bytes."""
    max_sentences: Index = 0
    """Train on a random choice of this many lines (saves memory on large corpora); 0: on all."""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command = Command("kvshare train-tokenizer", "Train a SentencePiece tokenizer.", _EXAMPLES)
    config = parse(TrainTokenizerConfig, argv, command)
    job = TokenizerJob(
        inputs=config.input,
        output=config.output,
        vocab_size=config.vocab_size,
        json_key=config.json_key,
        character_coverage=config.character_coverage,
        max_sentences=config.max_sentences,
    )
    started = time.monotonic()
    trained = train_tokenizer(job)
    size, seconds = trained.text_bytes / 1e6, time.monotonic() - started
    print(f"trained on {size:.1f} MB of text ({trained.sentences:,} lines) in {seconds:.1f} s")
    print(f"wrote {trained.model} ({config.vocab_size:,} tokens) and {trained.vocab}")
    return 0
