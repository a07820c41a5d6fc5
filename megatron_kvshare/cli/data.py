"""``kvshare data merge | split | shuffle | inspect | index``: work on token files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_kvshare.cli.progress import ProgressLine
from megatron_kvshare.cli.subcommands import dispatch
from megatron_kvshare.config.blend import parse_split
from megatron_kvshare.config.fields.data import TokenizerType
from megatron_kvshare.config.fields.types import SCHEMA, Count, Index, Seed, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse

if TYPE_CHECKING:
    from megatron_kvshare.data.corpus import Corpus
    from megatron_kvshare.data.rearrange import Result

_EXAMPLES = """\
  kvshare data merge --input data/web_0 data/web_1 --output-prefix data/web --dedup exact
  kvshare data split --input data/web --output-prefix data/web --split 98,2,0
  kvshare data shuffle --input data/web --output-prefix data/web_shuffled --seed 1
  kvshare data inspect --input data/web --tokenizer-model tok.model --png lengths.png
  kvshare data index --config run.yaml

Input are prefixes of .bin/.idx files, or a folder of them. Files that are written are complete or
not there; the same input gives the same output, whatever the machine and its memory."""

Dedup = Literal["none", "exact"]
Megabytes = Annotated[int, Field(ge=1, le=1 << 30)]


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class MergeConfig:
    """Several token files into one, document by document in the order they are given."""

    input: tuple[str, ...]
    """Prefixes of .bin/.idx files, or folders of them."""
    output_prefix: str
    """Prefix of the files to write."""
    dedup: Dedup = "none"
    """exact: of documents with the same tokens only the first stays (40 bytes of memory for each
    document)."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class SplitConfig:
    """Token files into PREFIX_train, PREFIX_valid and PREFIX_test, the documents that training
    gives to each part by the same --split."""

    input: tuple[str, ...]
    """Prefixes of .bin/.idx files, or folders of them."""
    output_prefix: str
    """Start of the prefixes to write."""
    split: str = "969,30,1"
    """Shares of training, validation and test documents."""
    dedup: Dedup = "none"
    """exact: of documents with the same tokens only the first stays, in whatever part."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class ShuffleConfig:
    """Documents into a random order, which the seed and their number decide alone."""

    input: tuple[str, ...]
    """Prefixes of .bin/.idx files, or folders of them."""
    output_prefix: str
    """Prefix of the files to write."""
    seed: Seed = 1234
    """Decides the order."""
    max_memory_mb: Megabytes = 1024
    """Documents held in memory at a time (one of them at least); the files are read through as
    often as they are larger than this. The order does not depend on it."""
    dedup: Dedup = "none"
    """exact: of documents with the same tokens only the first stays (40 bytes of memory for each
    document)."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class InspectConfig:
    """What token files hold."""

    input: tuple[str, ...]
    """Prefixes of .bin/.idx files, or folders of them."""
    seq_length: Count = 2048
    """Which documents are longer than a training sequence."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """Tokenizer file or folder, to show samples as text; left out: as ids."""
    trust_remote_code: bool = False
    """Run code that the folder of --tokenizer-model brings along; never done otherwise."""
    samples: Index = 3
    """Documents to show the start of."""
    seed: Seed = 1234
    """Which ones."""
    png: str | None = None
    """Write the histogram of lengths to this file."""
    no_duplicates: bool = False
    """Do not look for equal documents: only the index is read, which is quick."""


def run(argv: Sequence[str]) -> int:
    """Run one of the subcommands."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "merge": _merge,
        "split": _split,
        "shuffle": _shuffle,
        "inspect": _inspect,
        "index": _index,
    }
    return dispatch("kvshare data", "command", commands, _EXAMPLES, argv)


def _merge(argv: Sequence[str]) -> int:
    config = parse(MergeConfig, argv, _command("merge", "Merge token files."))
    from megatron_kvshare.data.rearrange import merge

    corpus = _open_to_write(config.input)
    _say(merge(corpus, config.output_prefix, config.dedup == "exact", _progress(corpus)))
    return 0


def _split(argv: Sequence[str]) -> int:
    config = parse(SplitConfig, argv, _command("split", "Split token files by documents."))
    shares = parse_split(config.split)
    from megatron_kvshare.data.rearrange import split

    corpus = _open_to_write(config.input)
    dedup = config.dedup == "exact"
    _say(split(corpus, config.output_prefix, shares, dedup, _progress(corpus)))
    return 0


def _shuffle(argv: Sequence[str]) -> int:
    config = parse(ShuffleConfig, argv, _command("shuffle", "Shuffle documents."))
    from megatron_kvshare.data.rearrange import shuffle

    corpus = _open_to_write(config.input)
    made = shuffle(
        corpus,
        config.output_prefix,
        config.seed,
        config.max_memory_mb * 1_000_000,
        config.dedup == "exact",
        _progress(corpus),
    )
    _say(made)
    return 0


def _inspect(argv: Sequence[str]) -> int:
    config = parse(InspectConfig, argv, _command("inspect", "Look into token files."))
    from megatron_kvshare.data.corpus import open_corpus
    from megatron_kvshare.data.inspect import draw, inspect, samples
    from megatron_kvshare.data.tokenizers import load_tokenizer

    tokenizer = None
    if config.tokenizer_model is not None:
        kind, model = config.tokenizer_type, config.tokenizer_model
        tokenizer = load_tokenizer(kind, model, trust_remote_code=config.trust_remote_code)
    corpus = open_corpus(config.input)
    found = inspect(corpus, config.seq_length, not config.no_duplicates, _progress(corpus))
    for files in corpus.files:
        made_by = files.notes.get("tokenizer_model") or "a tokenizer that is not noted"
        print(
            f"{files.prefix}: {files.num_documents:,} documents of {files.index.dtype}, {made_by}"
        )
    print("\n".join(["", *found.lines()]))
    for text in samples(corpus, config.samples, config.seed, tokenizer):
        print(f"\n{text}")
    if config.png is not None:
        draw(found, Path(config.png))
        print(f"\nwrote {config.png}")
    return 0


def _index(argv: Sequence[str]) -> int:
    """Takes the command line of the run that the index is for."""
    if "--help" in argv or "-h" in argv:
        print(
            "usage: kvshare data index [flags of kvshare pretrain]\n\nMakes the indices of samples"
            " that a run will read, ahead of time, on one process without a\nGPU. Flags are those"
            " of the run: `kvshare pretrain --help`. The run finds them in\n--data-cache-path, or"
            " beside the data."
        )
        return 0
    from megatron_kvshare.config.pretrain import parse_pretrain, world_size
    from megatron_kvshare.spec.run_plan import RunPlan

    config = parse_pretrain([*argv, "--dry-run"])  # of a run on any number of processes
    planned = RunPlan.of(config, world_size(config))
    from megatron_kvshare.data import train_data
    from megatron_kvshare.data.vocabulary import resolve_vocabulary
    from megatron_kvshare.train.setup import data_request

    vocabulary = resolve_vocabulary(config.data, config.model.vocab_size)
    data = train_data.build(config.data, data_request(planned, vocabulary))
    print("\n".join(data.plan.lines()))
    for warning in data.plan.warnings(config.data.max_epochs):
        print(f"warning: {warning}", file=sys.stderr)
    if data.plan.rows:
        print(
            f"the indices of these samples are in {train_data.cache_folder(config.data, data.plan)}"
        )
    return 0


def _command(name: str, description: str) -> Command:
    return Command(f"kvshare data {name}", description, _EXAMPLES)


def _open_to_write(inputs: Sequence[str]) -> Corpus:
    from megatron_kvshare.data.corpus import open_corpus
    from megatron_kvshare.data.rearrange import differing_notes

    corpus = open_corpus(inputs)
    for name in differing_notes(corpus):
        print(f"warning: the inputs do not agree in {name}, so it is not noted", file=sys.stderr)
    return corpus


def _progress(corpus: Corpus) -> Callable[[int], None]:
    line = ProgressLine()
    total = corpus.num_documents
    return lambda done: line.show(done / max(total, 1), f"{done:,} of {total:,} documents")


def _say(result: Result) -> None:
    if result.left_out:
        print(f"left out {result.left_out:,} documents that are equal to one before them")
    for made in result.made:
        print(
            f"wrote {made.prefix}.bin and .idx: {made.documents:,} documents,"
            f" {made.tokens:,} tokens"
        )
