"""``kvshare preprocess``: jsonl or plain text to Megatron ``.bin/.idx`` files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from megatron_kvshare.cli.progress import ProgressLine
from megatron_kvshare.config.fields.data import TokenizerType
from megatron_kvshare.config.fields.types import SCHEMA, Count, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.data.documents import TextDocuments
from megatron_kvshare.data.preprocess import Counts, InnerEnds, PreprocessJob, preprocess
from megatron_kvshare.data.token_files import open_checked

_EXAMPLES = """\
  kvshare preprocess --input books.jsonl.xz more.jsonl --output-prefix data/books \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model --workers 8 --append-eod
  kvshare pretrain --data-path data/books_text_document --tokenizer-model tok.model ...

Input may be compressed (.xz, .gz, .bz2). Files that are not .jsonl or .json are plain text."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class PreprocessConfig:
    """Text to token files, the same for any number of workers; written completely or not at all."""

    input: tuple[str, ...]
    """Files: .jsonl (one JSON object per line) or plain text, also .xz, .gz or .bz2."""
    output_prefix: str
    """Start of the output names: PREFIX_text_document.bin and .idx."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """Tokenizer file (SentencePiece .model, tokenizer.json) or folder (Hugging Face)."""
    trust_remote_code: bool = False
    """Run code that the folder of --tokenizer-model brings along; never done otherwise."""
    vocab_size: Count | None = None
    """Number of token ids, for NullTokenizer only (the last one ends documents)."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the text in .jsonl; each gets files of its own: PREFIX_KEY_document."""
    text_documents: TextDocuments = "file"
    """Plain text: one document per file, per paragraph (between blank lines), or per line."""
    append_eod: bool = False
    """End every document with the end-of-document token (needed for packed documents)."""
    split_special_tokens: bool = False
    """Encode the names of special tokens inside a text, such as </s>, as text and not as the token
    (Hugging Face; SentencePiece does so by itself)."""
    workers: Count = 1
    """Processes that tokenize."""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command = Command(
        "kvshare preprocess", "Turn text into token files for pretraining.", _EXAMPLES
    )
    config = parse(PreprocessConfig, argv, command)
    job = PreprocessJob(
        inputs=config.input,
        output_prefix=config.output_prefix,
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        trust_remote_code=config.trust_remote_code,
        vocab_size=config.vocab_size,
        json_keys=config.json_keys,
        text_documents=config.text_documents,
        append_eod=config.append_eod,
        split_special_tokens=config.split_special_tokens,
        workers=config.workers,
    )
    started = time.monotonic()
    counts = preprocess(job, _Reporter(started))
    skipped = f", {counts.skipped:,} without text skipped" if counts.skipped else ""
    seconds = time.monotonic() - started
    print(f"{counts.documents:,} documents, {counts.tokens:,} tokens{skipped}, {seconds:.1f} s")
    for warning in _warnings(counts.inner_ends, config):
        print(f"warning: {warning}", file=sys.stderr)
    for prefix in job.prefixes:
        print(f"wrote {prefix}.bin and .idx; train with --data-path {prefix}")
        entropy = open_checked(prefix).unigram_entropy()
        print(f"unigram entropy {entropy:.3f} nats: the loss when only token frequencies are known")
    return 0


def _warnings(found: InnerEnds, config: PreprocessConfig) -> Iterator[str]:
    if not found.tokens:
        return
    fix = "--split-special-tokens makes it text"
    if config.split_special_tokens or config.tokenizer_type != "HuggingFaceTokenizer":
        fix = "take it out of the text, or use another tokenizer"
    yield (
        f"{found.documents:,} documents hold the end-of-document token, {found.tokens:,} times, as"
        f" the first in {found.first} does: where documents are packed they are cut there. If that"
        f" is not meant, {fix}"
    )


class _Reporter:
    """Shows how far the input has been read."""

    def __init__(self, started: float) -> None:
        self.line = ProgressLine(started)

    def __call__(self, progress: Counts) -> None:
        rate = progress.tokens / self.line.elapsed
        counts = f"{progress.documents:,} documents  {progress.tokens:,} tokens"
        share = progress.bytes_read / progress.total_bytes
        self.line.show(share, f"{counts}  {rate:,.0f} tokens/s")
