"""What runs a global batch through the stages of a rank, and the sums that come out.

Two runners, by what the map needs: stages one after another, by megatron-core's schedules
(:mod:`~megatron_kvshare.pipeline.schedule_runner`), or sweeps round the pipeline, where cyclic
groups span stages (:mod:`~megatron_kvshare.pipeline.task_runner`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.megatron_api.parallel import ParallelState, all_reduce_
from megatron_kvshare.sharing.plan import ExecutionPlan


class Pass(NamedTuple):
    """How microbatches go through the model: by which sweeps, whether to measure how far each of
    them moves the shared KV, and whether gradients are wanted."""

    plan: ExecutionPlan
    measure_residual: bool = False
    forward_only: bool = False


class Sums(NamedTuple):
    """fp64 sums of microbatches ``[m]``, or of one of them ``[]``.

    ``loss``: of the tokens that count; ``num_tokens``: how many do; ``residuals`` ``[m, groups,
    sweeps, 2]``: see :func:`megatron_kvshare.model.kv.residual`, None where not measured.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    residuals: torch.Tensor | None = None

    @classmethod
    def of(
        cls, losses: torch.Tensor, counted: torch.Tensor, residuals: torch.Tensor | None
    ) -> Sums:
        """Of one microbatch: ``losses`` ``[b, s]``, 0 where not ``counted``."""
        return cls(losses.double().sum(), counted.sum().double(), residuals)

    @classmethod
    def stack(cls, each: Sequence[Sums]) -> Sums:
        """``[]`` of every microbatch -> ``[m]``."""
        return cls(*(None if x[0] is None else torch.stack(x) for x in zip(*each, strict=True)))

    def plus(self, other: Sums) -> Sums:
        pairs = zip(self, other, strict=True)
        return Sums(*(None if x is None or y is None else x + y for x, y in pairs))

    def first(self, microbatches: int) -> Sums:
        return Sums(*(None if x is None else x[:microbatches] for x in self))

    def over_ranks(self, state: ParallelState) -> Sums:
        """Added over the data-parallel and the pipeline ranks, in one message each."""
        flat = [x.flatten(1) if x.dim() > 1 else x[:, None] for x in self if x is not None]
        rows = torch.cat(flat, dim=1)
        all_reduce_(all_reduce_(rows, state.dp_group), state.pp_group)
        residuals = None if self.residuals is None else rows[:, 2:].view(self.residuals.shape)
        return Sums(rows[:, 0], rows[:, 1], residuals)

    @property
    def mean_loss(self) -> float:
        """Per token that counts, over all microbatches; 0 without any."""
        loss, num_tokens = float(self.loss.sum()), float(self.num_tokens.sum())
        return loss / num_tokens if num_tokens else 0.0


class BatchRunner(Protocol):
    def run(self, batches: Iterator[Batch], count: int, how: Pass) -> Sums:
        """``count`` microbatches of ``batches``; sums ``[count]`` as far as they arose on this
        rank.

        Unless ``how.forward_only`` the gradient buffers then hold the gradient of the mean loss
        per token of the **global** batch.
        """
        ...


def counted_tokens(batch: Batch) -> torch.Tensor:
    """``[b, s]``: which tokens the loss counts."""
    return batch.loss_mask > 0
