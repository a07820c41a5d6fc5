"""What a run will read, known before anything is built: documents, tokens, samples, epochs per
source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_kvshare.config import DataConfig
from megatron_kvshare.data.sources import Source, find_sources
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.megatron_api.datasets import DataPart, PartSpec

_MIN_ROUND = 1024
"""Smaller sources get an index over several epochs, so that little is lost at its end (less than
one sequence).
"""


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What a run reads: sizes in tokens, sequences and steps."""

    seq_length: int
    global_batch_size: int
    train_iters: int
    eval_iters: int = 0
    seed: int = 1234
    vocabulary: Vocabulary

    @property
    def parts(self) -> list[DataPart]:
        """Training data, and validation data when there is evaluation."""
        return [DataPart.train, DataPart.valid] if self.eval_iters else [DataPart.train]

    def samples(self, part: DataPart) -> int:
        """Samples of the whole run (training) or of one evaluation (validation)."""
        return self.global_batch_size * (
            self.train_iters if part is DataPart.train else self.eval_iters
        )


@dataclass(frozen=True)
class PlanRow:
    """One source of one part: its share of the blend, and what the run draws from it."""

    part: DataPart
    source: str
    documents: tuple[int, int]
    tokens: int
    weight: float
    samples: int
    epochs: float
    fingerprint: str
    index_sha256: str

    @property
    def num_documents(self) -> int:
        """Documents of the source in this part."""
        return self.documents[1] - self.documents[0]

    @property
    def identity(self) -> dict[str, Any]:
        """The row for :attr:`DataPlan.identity`; ``source`` is there for the reader."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "index_sha256": self.index_sha256,
            "documents": list(self.documents),
            "weight": self.weight,
        }

    def spec(self, request: DataRequest) -> PartSpec:
        """How to build the samples."""
        small = self.tokens <= _MIN_ROUND * request.seq_length
        return PartSpec(
            prefix=self.source,
            part=self.part,
            documents=self.documents,
            min_samples=_MIN_ROUND if small else None,
            seq_length=request.seq_length,
            seed=request.seed,
            fingerprint=self.fingerprint,
            index_sha256=self.index_sha256,
        )


@dataclass(frozen=True)
class DataPlan:
    """The data of a run; ``rows`` is empty for mock data."""

    request: DataRequest
    rows: list[PlanRow] = field(default_factory=list)

    @property
    def parts(self) -> list[DataPart]:
        """Parts the run reads."""
        return self.request.parts

    def rows_of(self, part: DataPart) -> list[PlanRow]:
        """The sources of one part."""
        return [row for row in self.rows if row.part is part]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens every step reads, whatever the length of the run or its batch;
        plain data, to be stored in checkpoints."""
        sources: dict[str, Any] = {
            part.name: [row.identity for row in self.rows_of(part)]
            for part in self.parts
            if self.rows
        }
        return {
            "seq_length": self.request.seq_length,
            "seed": self.request.seed,
            "mock_data": not self.rows,
            **sources,
        }

    def lines(self) -> list[str]:
        """The plan as an aligned table, one string per line."""
        if not self.rows:
            return ["mock data: made-up tokens, no files"]
        table = [("part", "weight", "documents", "tokens", "samples", "epochs", "source")]
        for row in self.rows:
            numbers = (
                f"{row.weight:.3f}",
                f"{row.num_documents:,}",
                f"{row.tokens:,}",
                f"{row.samples:,}",
            )
            table.append((row.part.name, *numbers, f"{row.epochs:.2f}", row.source))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return [
            "  ".join(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False))
            + "  "
            + line[-1]
            for line in table
        ]


def plan_data(data: DataConfig, request: DataRequest) -> DataPlan:
    """Check the data and count what the run will read; needs no process group and writes nothing.

    Args:
        data: data settings.
        request: what the run reads.

    Raises:
        DataError: missing or broken files, a split without documents, tokens outside the
        vocabulary.
    """
    if data.mock_data:
        return DataPlan(request)
    found = find_sources(data, request.parts, request.vocabulary)
    return DataPlan(
        request, [row for part in request.parts for row in _rows(part, found[part], request)]
    )


def _rows(part: DataPart, sources: list[Source], request: DataRequest) -> list[PlanRow]:
    shares = [
        float(source.tokens) if source.weight is None else source.weight for source in sources
    ]
    rows = []
    for source, share in zip(sources, shares, strict=True):
        weight = share / sum(shares)
        samples = round(request.samples(part) * weight)
        epochs = samples * request.seq_length / source.tokens
        files = source.files
        rows.append(
            PlanRow(
                part=part,
                source=files.prefix,
                documents=source.documents,
                tokens=source.tokens,
                weight=weight,
                samples=samples,
                epochs=epochs,
                fingerprint=files.fingerprint,
                index_sha256=files.index.sha256,
            )
        )
    return rows
