"""What token files hold: counts, lengths of documents, duplicates, and some of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_kvshare.data.corpus import Corpus
from megatron_kvshare.data.duplicates import Report, find_duplicates
from megatron_kvshare.data.tokenizers import Tokenizer
from megatron_kvshare.errors import DataError, Fault

_SHARES = (0.5, 0.9, 0.99)
_BAR = 40
_SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Repeated:
    """Documents that another one before them is equal to, their tokens, and how many different
    ones they are copies of."""

    documents: int
    tokens: int
    originals: int


@dataclass(frozen=True)
class Content:
    """What is in a corpus. ``quantiles``: lengths that these shares of the documents do not exceed;
    ``bins``: documents of 0 tokens, of 1, of 2 to 3, of 4 to 7, ...; ``longer``: documents of more
    than ``seq_length`` tokens; ``repeated``: None where it was not looked for."""

    documents: int
    tokens: int
    smallest: int
    largest: int
    shortest: int
    longest: int
    quantiles: dict[float, int]
    bins: tuple[int, ...]
    seq_length: int
    longer: int
    longer_tokens: int
    repeated: Repeated | None

    def lines(self) -> list[str]:
        """For a reader."""
        text = [
            f"{self.documents:,} documents, {self.tokens:,} tokens,"
            f" {self.tokens / self.documents:,.1f} per document",
            f"token ids from {self.smallest} to {self.largest}",
            f"tokens per document: {self.shortest:,} to {self.longest:,}; "
            + ", ".join(
                f"{share:.0%} have at most {length:,}" for share, length in self.quantiles.items()
            ),
            f"longer than a sequence of {self.seq_length:,} tokens:"
            f" {_share(self.longer, self.documents)} of the documents with"
            f" {_share(self.longer_tokens, self.tokens)} of the tokens",
        ]
        if self.repeated is not None:
            text.append(
                f"exact duplicates: {_share(self.repeated.documents, self.documents)} of the"
                f" documents with {_share(self.repeated.tokens, self.tokens)} of the tokens,"
                f" copies of {self.repeated.originals:,}"
            )
        return [*text, "", *self._histogram()]

    def _histogram(self) -> list[str]:
        names = [_bin_name(number) for number in range(len(self.bins))]
        width, most = max(map(len, names)), max(self.bins)
        digits = len(f"{most:,}")
        first = next(number for number, count in enumerate(self.bins) if count)
        return [
            f"{'tokens':>{width}}  documents",
            *(
                f"{name:>{width}}  {count:>{digits},}  {'#' * -(-count * _BAR // most)}".rstrip()
                for name, count in [*zip(names, self.bins, strict=True)][first:]
            ),
        ]


def inspect(
    corpus: Corpus, seq_length: int, duplicates: bool = True, report: Report = lambda _: None
) -> Content:
    """Look through a corpus: its index, and all tokens where ``duplicates`` are looked for.

    Raises:
        DataError: there is nothing in it.
    """
    lengths = corpus.lengths
    if not corpus.num_tokens:
        names = " ".join(files.prefix for files in corpus.files)
        raise DataError(Fault("--input", names, "it has no tokens", "give other files"))
    ranked = numpy.sort(lengths)
    at = {share: max(-(-int(share * 100) * ranked.size // 100) - 1, 0) for share in _SHARES}
    long = lengths > seq_length
    scans = [files.scan(None) for files in corpus.files if files.bin_bytes]
    return Content(
        documents=corpus.num_documents,
        tokens=corpus.num_tokens,
        smallest=min(scan.smallest for scan in scans),
        largest=max(scan.largest for scan in scans),
        shortest=int(ranked[0]),
        longest=int(ranked[-1]),
        quantiles={share: int(ranked[place]) for share, place in at.items()},
        bins=_bins(ranked),
        seq_length=seq_length,
        longer=int(long.sum()),
        longer_tokens=int(lengths[long].sum(dtype=numpy.int64)),
        repeated=_repeated(corpus, report) if duplicates else None,
    )


def samples(corpus: Corpus, count: int, seed: int, tokenizer: Tokenizer | None) -> list[str]:
    """The starts of some documents, drawn at random: text, or ids where no tokenizer is given."""
    random = numpy.random.default_rng(seed)
    chosen = random.choice(corpus.num_documents, min(count, corpus.num_documents), replace=False)
    found = []
    for document in numpy.sort(chosen):
        lengths, tokens = next(corpus.batches(iter([document[None]]), 0))
        ids = tokens[:_SAMPLE_TOKENS].tolist()
        text = " ".join(map(str, ids)) if tokenizer is None else _decoded(tokenizer, ids)
        more = " ..." if tokens.size > _SAMPLE_TOKENS else ""
        found.append(f"document {document:,} ({int(lengths[0]):,} tokens): {text}{more}")
    return found


def draw(content: Content, path: Path) -> None:
    """Write the histogram of lengths as a PNG.

    Raises:
        DataError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        rule, fix = "it needs the package matplotlib", "pip install 'megatron-kvshare[plot]'"
        raise DataError(Fault("--png", str(path), rule, fix)) from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.bar(range(len(content.bins)), content.bins)
    axes.set_xticks(range(len(content.bins)), map(_bin_name, range(len(content.bins))))
    axes.tick_params(axis="x", labelrotation=60)
    axes.axvline(float(numpy.log2(content.seq_length)) + 0.5, color="tab:red", linestyle="--")
    axes.set(xlabel="tokens (dashed: --seq-length)", ylabel="documents")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        rule = f"it cannot be written: {error.strerror}"
        raise DataError(Fault("--png", str(path), rule, "give another path")) from error


def _repeated(corpus: Corpus, report: Report) -> Repeated:
    found = find_duplicates(corpus, report)
    again = ~found.first
    tokens = int(corpus.lengths[again].sum(dtype=numpy.int64))
    return Repeated(int(again.sum()), tokens, found.groups)


def _bins(ranked: numpy.ndarray) -> tuple[int, ...]:
    """Documents whose length has 0, 1, 2, ... binary digits."""
    borders = 1 << numpy.arange(int(ranked[-1]).bit_length(), dtype=numpy.int64)
    ends = [*numpy.searchsorted(ranked, borders, "left").tolist(), ranked.size]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def _bin_name(digits: int) -> str:
    low, high = 1 << digits >> 1, (1 << digits) - 1
    return f"{high:,}" if digits < 2 else f"{low:,}-{high:,}"


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """On one line."""
    known = [token for token in ids if 0 <= token < tokenizer.vocab_size]
    return repr(tokenizer.decode(known))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"
