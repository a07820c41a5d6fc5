"""Stages one after another, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.megatron_api.optimizer import Models
from megatron_kvshare.megatron_api.schedule import run_schedule
from megatron_kvshare.pipeline.chunk import StageChunk, stage_formats
from megatron_kvshare.pipeline.runner import Pass, Sums
from megatron_kvshare.stages.placement import PayloadShape, Placement


class ScheduleRunner:
    """The :class:`~megatron_kvshare.pipeline.runner.BatchRunner` of one stage, 1F1B and the
    interleaved schedule."""

    def __init__(self, chunks: Sequence[StageChunk]) -> None:
        self.chunks = chunks

    @classmethod
    def of(cls, models: Models, placement: Placement, payload: PayloadShape) -> ScheduleRunner:
        """``models``: this rank's stages, wrapped for data parallelism."""
        return cls(
            [
                StageChunk(
                    each, *stage_formats(placement, each.module.stage, payload, each.module.heads)
                )
                for each in models
            ]
        )

    def run(self, batches: Iterator[Batch], count: int, how: Pass) -> Sums:
        of_chunks = run_schedule(
            self.chunks,
            batches,
            how,
            num_microbatches=count,
            cuts=[chunk.cuts for chunk in self.chunks],
            forward_only=how.forward_only,
        )
        return reduce(Sums.plus, (Sums.stack(sums) for sums in of_chunks))
