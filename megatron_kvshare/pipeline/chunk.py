"""One stage of the model as megatron-core's schedules want it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.megatron_api.schedule import ChunkOutput
from megatron_kvshare.model.gpt import ModelOutput
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.pipeline.payload import PayloadFormat
from megatron_kvshare.pipeline.runner import Pass, Sums, counted_tokens
from megatron_kvshare.stages.placement import PayloadShape, Placement, Stage, boundary_widths


class StageChunk(nn.Module):
    """A model stage, ``wrapped`` for data parallelism, with payloads in place of named tensors.

    ``entering`` and ``leaving``: the formats of its cuts, None at the ends of the model.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        entering: PayloadFormat | None,
        leaving: PayloadFormat | None,
    ) -> None:
        super().__init__()
        self.module = wrapped
        self.config = copy.copy(wrapped.config)  # for the schedule, which is told payload sizes
        self.entering = entering
        self.leaving = leaving
        self._payload: torch.Tensor | None = None

    @property
    def cuts(self) -> tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]:
        """Shapes of the payloads that enter and leave."""
        entering, leaving = (each and each.shape for each in (self.entering, self.leaving))
        return entering, leaving

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        """The schedule hands over what the stage below sent, right before :meth:`forward`."""
        (self._payload,) = tensors

    def forward(self, batch: Batch, how: Pass) -> ChunkOutput:
        """What to send to the stage above, or on the last one the sum of the token losses."""
        payload, self._payload = self._payload, None
        entering = None
        if self.entering is not None:
            assert payload is not None, "the stage below sent nothing"
            entering = self.entering.unpack(payload)
        counted = counted_tokens(batch)
        output: ModelOutput = self.module(
            batch.tokens,
            batch.labels,
            batch.position_ids,
            batch.document_ids,
            measure_residual=how.measure_residual,
            plan=how.plan,
            entering=entering,
            counted=counted,
        )
        if self.leaving is not None:
            assert output.leaving is not None, "only the last stage keeps its output"
            packed = self.leaving.pack(output.leaving)
            nothing = packed.new_zeros((), dtype=torch.float64)
            return ChunkOutput(packed, nothing.int(), Sums(nothing, nothing, output.residuals))
        assert output.value is not None and output.loss is not None, "the last stage has the loss"
        sums = Sums.of(output.value, counted, output.residuals)
        return ChunkOutput(output.loss, sums.num_tokens.int(), sums)


def stage_formats(
    placement: Placement, stage: Stage, shape: PayloadShape, heads: HeadLayout
) -> tuple[PayloadFormat | None, PayloadFormat | None]:
    """Of the payloads that enter and leave ``stage``."""
    widths = boundary_widths(placement, shape)

    def at(cut: int, producers: tuple[int, ...]) -> PayloadFormat | None:
        if not 0 <= cut < len(widths):
            return None
        return PayloadFormat(
            shape.hidden_size,
            producers,
            (shape.rows, shape.sequences, widths[cut]),
            heads,
            shape.sequence_ranks,
        )

    return at(stage.number - 1, stage.receives), at(stage.number, stage.sends)
