"""Batches for training and validation: the same ones on every number of processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_kvshare.config import DataConfig
from megatron_kvshare.data.data_plan import DataPlan, DataRequest, plan_data
from megatron_kvshare.data.mock import MockSamples
from megatron_kvshare.data.packing import document_ids, position_ids
from megatron_kvshare.data.sources import token_outside
from megatron_kvshare.data.staged import StagedStream
from megatron_kvshare.data.stream import SampleStream
from megatron_kvshare.errors import STOP_SIGNALS, DataError
from megatron_kvshare.megatron_api.datasets import DataPart, build_samples

_MOCK_SAMPLES = 1 << 16


class Batch(NamedTuple):
    """One micro-batch on the CPU; ``b`` sequences of ``s`` tokens."""

    tokens: Tensor
    """``[b, s]`` int64."""
    labels: Tensor
    """``[b, s]`` int64, the token after each."""
    loss_mask: Tensor
    """``[b, s]`` float32, 0 where the loss does not count."""
    position_ids: Tensor | None
    """``[b, s]`` int64 with ``--reset-position-ids``, else None (0 ... s - 1)."""
    document_ids: Tensor | None
    """``[b, s]`` int64 with ``--reset-attention-mask``, else None (one document)."""


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Which samples of a global batch one data-parallel rank reads, and how many at a time."""

    micro_batch_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1


class TrainData:
    """Endless training batches and repeatable validation batches of one data-parallel rank.

    Every process of a model-parallel group reads the same batches. Make it with :func:`build`.
    """

    def __init__(
        self,
        data: DataConfig,
        plan: DataPlan,
        share: RankShare,
        streams: dict[DataPart, StagedStream],
    ) -> None:
        self.plan = plan
        self._data = data
        self._share = share
        self._streams = streams

    def train_batches(self, consumed_samples: int = 0) -> Iterator[Batch]:
        """Micro-batches of this rank without end, in the order of optimizer steps.

        Args:
            consumed_samples: training samples that all ranks together have used so far.
        """
        indices = micro_batches(self._share, self.plan.request.global_batch_size, consumed_samples)
        return self._batches(DataPart.train, indices)

    def valid_batches(self) -> Iterator[Batch]:
        """Micro-batches of one evaluation: always the same samples, so that values compare."""
        return self._eval_batches(DataPart.valid)

    def test_batches(self) -> Iterator[Batch]:
        """Micro-batches of the evaluation at the end, on test data."""
        return self._eval_batches(DataPart.test)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens every step reads and how they count, as plain data."""
        return {
            **self.plan.identity,
            "reset_position_ids": self._data.reset_position_ids,
            "reset_attention_mask": self._data.reset_attention_mask,
            "eod_mask_loss": self._data.eod_mask_loss,
        }

    def source_of(self, sample: int) -> tuple[str, int]:
        """Where training sample ``sample`` comes from: prefix of the data, and its number there."""
        place = self._streams[DataPart.train].locate(sample)
        rows = self.plan.rows_of(DataPart.train, place.stage)
        return (rows[place.source].source if rows else "mock data"), place.number

    def stage_of(self, sample: int) -> int:
        """The stage, from 0, that training sample ``sample`` is of."""
        return self._streams[DataPart.train].stage_of(sample)

    def tokens_by_source(self, first: int, end: int) -> dict[str, int]:
        """Tokens of the training samples ``[first, end)`` by the prefix of their data; empty for
        made-up ones."""
        found: dict[str, int] = {}
        for stage, counts in self._streams[DataPart.train].counts(first, end):
            rows = self.plan.rows_of(DataPart.train, stage)
            for row, samples in zip(rows, counts, strict=bool(rows)):
                tokens = samples * self.plan.request.seq_length
                found[row.source] = found.get(row.source, 0) + tokens
        return found

    def _eval_batches(self, part: DataPart) -> Iterator[Batch]:
        request = self.plan.request
        indices = micro_batches(self._share, request.global_batch_size, 0, request.eval_iters)
        return self._batches(part, indices)

    def _batches(self, part: DataPart, indices: Iterator[list[int]]) -> Iterator[Batch]:
        loader = DataLoader(
            self._streams[part],
            batch_sampler=indices,  # type: ignore[arg-type]
            num_workers=self._data.num_workers,
            # The loader draws a seed when it starts; from its own generator, so that no other draw
            # moves.
            generator=torch.Generator(),
            # Other ways import torch and megatron-core again in every loader: seconds of CPU.
            multiprocessing_context="fork" if self._data.num_workers else None,
            worker_init_fn=_leave_stopping_to_the_trainer,
        )
        yield from map(self._finish, loader)

    def _finish(self, ids: Tensor) -> Batch:
        """A batch of ``[b, s + 1]`` ids."""
        vocabulary = self.plan.request.vocabulary
        for token in map(int, torch.aminmax(ids)):
            if not 0 <= token < vocabulary.size:
                raise DataError(token_outside("training data", token, vocabulary.size))
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        loss_mask = torch.ones(tokens.shape)
        positions = documents = None
        if vocabulary.eod is not None:
            if self._data.reset_position_ids:
                positions = position_ids(tokens, vocabulary.eod)
            if self._data.reset_attention_mask:
                documents = document_ids(tokens, vocabulary.eod)
            if self._data.eod_mask_loss:
                loss_mask = loss_mask.masked_fill(tokens == vocabulary.eod, 0.0)
        return Batch(tokens, labels, loss_mask, positions, documents)


def _leave_stopping_to_the_trainer(_worker: int) -> None:
    """Schedulers signal all processes, and a loader that dies of it takes the trainer with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def build(data: DataConfig, request: DataRequest, share: RankShare | None = None) -> TrainData:
    """Check the data and open it for one rank; all ranks call this together.

    Args:
        data: data settings.
        request: what the run reads.
        share: this rank's share of each batch; left out: one process.

    Raises:
        DataError: anything about the data that would stop the run later.
    """
    plan = plan_data(data, request)
    streams = _mock_streams(request) if data.mock_data else _open_streams(data, plan)
    return TrainData(data, plan, share or RankShare(), streams)


def micro_batches(
    share: RankShare, global_batch_size: int, first_sample: int, num_batches: int | None = None
) -> Iterator[list[int]]:
    """Sample numbers of this rank's micro-batches.

    Step ``t`` holds samples ``[first + t * global, first + (t + 1) * global)`` whatever the share;
    they are dealt out in runs of ``micro_batch_size``, round after round over the ranks (as
    megatron's sequential sampler does).
    """
    chunk = share.micro_batch_size * share.dp_size
    assert global_batch_size % chunk == 0, "checked with the configuration"
    for step in count() if num_batches is None else range(num_batches):
        batch = first_sample + step * global_batch_size
        start = batch + share.dp_rank * share.micro_batch_size
        for first in range(start, batch + global_batch_size, chunk):
            yield list(range(first, first + share.micro_batch_size))


def cache_folder(data: DataConfig, plan: DataPlan) -> Path:
    """Where the indices of samples are kept."""
    return Path(data.data_cache_path or Path(plan.rows[0].source, "cache", "GPTDataset_indices"))


def _open_streams(data: DataConfig, plan: DataPlan) -> dict[DataPart, StagedStream]:
    request = plan.request
    specs = list(dict.fromkeys(row.spec(request) for row in plan.rows))
    samples = dict(zip(specs, build_samples(specs, cache_folder(data, plan)), strict=True))

    def blend(part: DataPart, stage: int = 0) -> SampleStream:
        rows = plan.rows_of(part, stage)
        sources = [samples[row.spec(request)] for row in rows]
        return SampleStream(sources, [row.weight for row in rows], request.seed)

    firsts = request.stage_firsts
    stages = [blend(DataPart.train, stage) for stage in range(len(firsts))]
    evaluated = [part for part in plan.parts if part is not DataPart.train]
    return {
        DataPart.train: StagedStream(stages, firsts),
        **{part: StagedStream([blend(part)]) for part in evaluated},
    }


def _mock_streams(request: DataRequest) -> dict[DataPart, StagedStream]:
    vocabulary = request.vocabulary
    eod = vocabulary.size - 1 if vocabulary.eod is None else vocabulary.eod

    def stream(part: DataPart) -> StagedStream:
        seed = request.seed + int(part)
        samples = MockSamples(_MOCK_SAMPLES, request.seq_length, vocabulary.size, eod, seed)
        return StagedStream([SampleStream([samples], [1.0], seed)])

    return {part: stream(part) for part in request.parts}
