"""``kvshare preprocess``: text of many forms to Megatron ``.bin/.idx`` files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from megatron_kvshare.cli.progress import ProgressLine
from megatron_kvshare.config.fields.data import TokenizerType
from megatron_kvshare.config.fields.types import SCHEMA, Count, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.data.documents import TextDocuments
from megatron_kvshare.data.preprocess import Counts, OnBadRecord, PreprocessJob, preprocess
from megatron_kvshare.data.token_files import open_checked
from megatron_kvshare.output import complain

_EXAMPLES = """\
  kvshare preprocess --input books.jsonl.xz more/ --output-prefix data/books \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model --workers 8 --append-eod
  kvshare preprocess --input 'shards/*.parquet' --json-keys content --on-bad-record skip ...
  zcat dump.gz | kvshare preprocess --input - ...
  kvshare pretrain --data-path data/books_text_document --tokenizer-model tok.model ...

Input is JSON lines, plain text, Parquet, Arrow, or a data set of the library `datasets`; also
compressed (gzip, xz, bzip2, Zstandard). What a file is, its content decides, not its name. Stopped
or killed, the same command goes on from what is finished, in PREFIX.unfinished."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class PreprocessConfig:
    """Text to token files, the same for any number of workers; written completely or not at all."""

    input: tuple[str, ...]
    """Files, folders, globs, - for standard input, or data sets of the Hugging Face hub
    (owner/name); read in this order, inside a folder or glob in that of the names."""
    output_prefix: str
    """Start of the output names: PREFIX_text_document.bin and .idx."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """Kind of tokenizer; TikTokenizer is for files of tiktoken, ByteLevelTokenizer has no file."""
    tokenizer_model: str | None = None
    """Tokenizer file (SentencePiece .model, tokenizer.json, .tiktoken) or folder (Hugging Face)."""
    trust_remote_code: bool = False
    """Run code that the folder of --tokenizer-model brings along; never done otherwise."""
    vocab_size: Count | None = None
    """Number of token ids: of NullTokenizer (the last one ends documents), of ByteLevelTokenizer
    (512), and of megatron-core's files for TikTokenizer (131072, special tokens included)."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the text in JSON lines, columns of a table; each gets files of its own:
    PREFIX_KEY_document."""
    text_documents: TextDocuments = "file"
    """Plain text: one document per file, per paragraph (between blank lines), or per line."""
    append_eod: bool = False
    """End every document with the end-of-document token (needed for packed documents)."""
    split_special_tokens: bool = False
    """Encode the names of special tokens inside a text, such as </s>, as text and not as the token
    (Hugging Face; SentencePiece does so by itself)."""
    on_bad_record: OnBadRecord = "stop"
    """What to do with a record that is no document (broken JSON, no text under the key, no UTF-8,
    NUL, half a surrogate pair, too long, a damaged file): stop, or skip and count it. The first of
    each kind are shown in PREFIX.skipped.jsonl. Documents without text are always skipped."""
    max_document_mb: Count = 64
    """Longer lines and documents are bad records; their rest is skipped unread. Memory: about 100
    times this for each worker while it has such a document, 100 MB and less without."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub; the commit is noted beside the result."""
    dataset_config: str | None = None
    """Configuration of a data set of the hub."""
    dataset_split: str = "train"
    """Split of a data set."""
    workers: Count = 1
    """Processes that tokenize, independent of the number of files."""


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
        on_bad_record=config.on_bad_record,
        max_document_bytes=config.max_document_mb * 1_000_000,
        revision=config.revision,
        dataset_config=config.dataset_config,
        dataset_split=config.dataset_split,
        workers=config.workers,
    )
    started = time.monotonic()
    counts = preprocess(job, _Reporter(started), _say)
    seconds = time.monotonic() - started
    for line in _summary(counts, seconds, job):
        print(line)
    for warning in _warnings(counts, config):
        complain(f"warning: {warning}")
    for prefix in job.prefixes:
        print(f"wrote {prefix}.bin and .idx; train with --data-path {prefix}")
        entropy = open_checked(prefix).unigram_entropy()
        print(f"unigram entropy {entropy:.3f} nats: the loss when only token frequencies are known")
    return 0


def _say(text: str) -> None:
    complain(text)


def _summary(counts: Counts, seconds: float, job: PreprocessJob) -> Iterator[str]:
    share = counts.text_bytes / counts.tokens
    yield (
        f"{counts.documents:,} documents, {counts.tokens:,} tokens, {share:.2f} bytes per token,"
        f" {seconds:.1f} s"
    )
    for reason, number in sorted(counts.skipped_records.counts.items()):
        yield f"{number:,} skipped: {reason}"
    if counts.skipped:
        yield f"the first of them are in {job.skipped_path}"


def _warnings(counts: Counts, config: PreprocessConfig) -> Iterator[str]:
    bad, found = counts.skipped_records.bad, counts.inner_ends
    if bad:
        yield f"{bad:,} bad records were left out"
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
        self.tokens_before: int | None = None

    def __call__(self, progress: Counts) -> None:
        if self.tokens_before is None:
            self.tokens_before = progress.tokens if progress.resumed_bytes else 0
        seconds = self.line.elapsed
        rate = (progress.tokens - self.tokens_before) / seconds
        speed = (progress.bytes_read - progress.resumed_bytes) / 1e6 / seconds
        counts = f"{progress.documents:,} documents  {progress.tokens:,} tokens"
        share, begun = None, 0.0
        if progress.total_bytes:
            share = progress.bytes_read / progress.total_bytes
            begun = progress.resumed_bytes / progress.total_bytes
        self.line.show(share, f"{counts}  {rate:,.0f} tokens/s  {speed:.1f} MB/s", begun)
