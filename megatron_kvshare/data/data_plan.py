"""What a run will read, known before anything is built: documents, tokens, samples, epochs per
source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from megatron_kvshare.config import DataConfig
from megatron_kvshare.config.data_files import DataStage
from megatron_kvshare.data.sources import Source, find_sources
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.megatron_api.datasets import DataPart, PartSpec

_MIN_ROUND = 1024
"""Smaller sources get an index over several epochs, so that little is lost at its end (less than
one sequence).
"""


MANY_EPOCHS = 4.0
"""Up to here text that is read again teaches about as much as new text (arXiv 2305.16264)."""


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What a run reads: sizes in tokens, sequences and steps; ``stages``: what takes the place of
    its training data on the way; ``reads_test``: there is test data."""

    seq_length: int
    global_batch_size: int
    train_iters: int
    eval_iters: int = 0
    seed: int = 1234
    vocabulary: Vocabulary
    stages: tuple[DataStage, ...] = ()
    reads_test: bool = False

    @property
    def parts(self) -> list[DataPart]:
        """Training data, and what is evaluated on when there is evaluation."""
        evaluated = [DataPart.valid, DataPart.test] if self.reads_test else [DataPart.valid]
        return [DataPart.train, *(evaluated if self.eval_iters else ())]

    @property
    def stage_firsts(self) -> tuple[int, ...]:
        """The training sample that each stage begins with; the first one is the run itself."""
        later = (each.first_sample(self.global_batch_size, self.seq_length) for each in self.stages)
        return (0, *later)

    def samples(self, part: DataPart, stage: int = 0) -> int:
        """Samples of a stage of the whole run (training) or of one evaluation."""
        if part is not DataPart.train:
            return self.global_batch_size * self.eval_iters
        end = self.global_batch_size * self.train_iters
        first, later = [*pairwise((*self.stage_firsts, end))][stage]
        return max(min(later, end) - first, 0)


@dataclass(frozen=True)
class PlanRow:
    """One source of one part: its share of the blend, and what the run draws from it. ``stage``:
    of the training data, from 0."""

    part: DataPart
    source: str
    documents: tuple[int, int]
    tokens: int
    weight: float
    samples: int
    epochs: float
    fingerprint: str
    index_sha256: str
    stage: int = 0
    has_notes: bool = True
    """Whether `kvshare preprocess` noted the tokenizer beside the files."""

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

    def rows_of(self, part: DataPart, stage: int = 0) -> list[PlanRow]:
        """The sources of one part."""
        return [row for row in self.rows if row.part is part and row.stage == stage]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens every step reads, whatever the length of the run or its batch;
        plain data, to be stored in checkpoints."""
        sources: dict[str, Any] = {
            part.name: [row.identity for row in self.rows_of(part)]
            for part in self.parts
            if self.rows
        }
        stages = [
            {
                "first_sample": first,
                "train": [row.identity for row in self.rows_of(DataPart.train, stage)],
            }
            for stage, first in enumerate(self.request.stage_firsts)
            if stage
        ]
        return {
            "seq_length": self.request.seq_length,
            "seed": self.request.seed,
            "mock_data": not self.rows,
            **sources,
            "stages": stages,
        }

    @property
    def epochs(self) -> dict[str, float]:
        """How often the whole run reads each training source, all stages together."""
        found: dict[str, float] = {}
        for row in self.rows:
            if row.part is DataPart.train:
                found[row.source] = found.get(row.source, 0.0) + row.epochs
        return found

    def lines(self) -> list[str]:
        """The plan as an aligned table, one string per line, and what there is to say of it."""
        if not self.rows:
            return ["mock data: made-up tokens, no files"]
        seq_length = self.request.seq_length
        table = [("part", "weight", "documents", "tokens", "samples", "reads", "epochs", "source")]
        for row in self.rows:
            numbers = (
                f"{row.weight:.3f}",
                f"{row.num_documents:,}",
                f"{row.tokens:,}",
                f"{row.samples:,}",
                f"{row.samples * seq_length:,}",
            )
            name = f"{row.part.name} {row.stage + 1}" if row.stage else row.part.name
            table.append((name, *numbers, f"{row.epochs:.2f}", row.source))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = [
            "  ".join(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False))
            + "  "
            + line[-1]
            for line in table
        ]
        return [*aligned, *self._stage_lines()]

    def notes(self) -> Iterator[str]:
        """What nobody can check, and is most likely fine."""
        unnoted = dict.fromkeys(row.source for row in self.rows if not row.has_notes)
        if unnoted:
            yield (
                f"without a note of their tokenizer, as stock files are: {', '.join(unnoted)}; that"
                " it is the one given cannot be checked, only that all ids are known"
            )

    def _stage_lines(self) -> Iterator[str]:
        if not self.request.stages:
            return
        firsts, seq_length = self.request.stage_firsts[1:], self.request.seq_length
        for number, (first, stage) in enumerate(zip(firsts, self.request.stages, strict=True), 2):
            yield (
                f"train {number} takes over with sample {first:,}, after {first * seq_length:,}"
                f" tokens ({stage.start} in {stage.where})"
            )
        yield "every stage reads its sources from their beginning, as a run of it alone would"
        for source, epochs in self.epochs.items():
            yield f"all stages together: {epochs:.2f} epochs of {source}"

    def warnings(self, max_epochs: float | None = None) -> list[str]:
        """What is allowed and probably not meant, one sentence each. ``max_epochs``: as the user
        has set it, which settles how often is too often."""
        found = [
            f"the run reads {source} {epochs:.1f} times ({epochs:.1f} epochs); text that is read"
            f" more than {MANY_EPOCHS:g} times teaches little more. Give more data, or say how"
            " often is fine by --max-epochs"
            for source, epochs in self.epochs.items()
            if max_epochs is None and epochs > MANY_EPOCHS
        ]
        found += [
            f"{stage.where}: {stage.start} lies behind the last step, so nothing of it is read"
            for number, stage in enumerate(self.request.stages, 1)
            if not self.request.samples(DataPart.train, number)
        ]
        return found


def plan_data(data: DataConfig, request: DataRequest) -> DataPlan:
    """Check the data and count what the run will read; needs no process group and writes nothing.

    Args:
        data: data settings.
        request: what the run reads.

    Raises:
        DataError: missing or broken files, a split without documents, tokens outside the
            vocabulary, a source that is read more often than ``--max-epochs``.
    """
    if data.mock_data:
        return DataPlan(request)
    found = find_sources(data, request.parts, request.vocabulary)
    blends = [(DataPart.train, 0, found[DataPart.train])]
    for number, stage in enumerate(request.stages, 1):
        own = _with_training_data(data, stage.words)
        sources = find_sources(own, [DataPart.train], request.vocabulary)
        blends.append((DataPart.train, number, sources[DataPart.train]))
    blends += [(part, 0, found[part]) for part in request.parts if part is not DataPart.train]
    rows = [row for blend in blends for row in _rows(*blend, request)]
    plan = DataPlan(request, rows)
    _check_epochs(plan, data.max_epochs)
    return plan


def _with_training_data(data: DataConfig, words: tuple[str, ...]) -> DataConfig:
    """A stage is split as the data that it takes the place of: documents held out stay so."""
    if data.data_path:
        return replace(data, data_path=words)
    return replace(data, train_data_path=words)


def _check_epochs(plan: DataPlan, most: float | None) -> None:
    too_often = [
        Fault(
            "--max-epochs",
            most,
            f"the run reads {source} {epochs:.2f} times",
            "give more data, a smaller weight or fewer steps, or raise --max-epochs",
        )
        for source, epochs in plan.epochs.items()
        if most is not None and epochs > most
    ]
    if too_often:
        raise DataError(too_often)


def _rows(
    part: DataPart, stage: int, sources: Sequence[Source], request: DataRequest
) -> list[PlanRow]:
    shares = [
        float(source.tokens) if source.weight is None else source.weight for source in sources
    ]
    rows = []
    for source, share in zip(sources, shares, strict=True):
        weight = share / sum(shares)
        samples = round(request.samples(part, stage) * weight)
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
                has_notes=bool(files.notes),
                stage=stage,
            )
        )
    return rows
