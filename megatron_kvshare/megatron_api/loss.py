"""Cross entropy from hidden states: the logits of a batch never exist, only those of a chunk.

Its gradient is computed in **forward**, chunk by chunk while the chunk's logits are there, and
scaled in backward: no product is computed twice. That needs to be known then: which tokens count,
and that all of them count alike. So the loss that can be differentiated is their sum; losses of
single tokens are there to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_kvshare.costs.memory import LOGITS_PER_CHUNK
from megatron_kvshare.megatron_api.layers import ColumnParallel, TransformerConfig
from megatron_kvshare.megatron_api.linear import add_product_, gradient_target


def logits_per_chunk(device: torch.device) -> int:
    """The most that exist at a time. On the CPU fewer, for its caches: 2^23 took 6 to 8 % off steps
    whose head is most of the work (vocabularies of 8,000 and 32,000), 2^25 took 2 %."""
    return LOGITS_PER_CHUNK if device.type == "cuda" else 1 << 23


class TokenLosses(NamedTuple):
    """``total``: the sum over the tokens that count, for backward; ``each``: fp32 ``[b, s]``, 0
    for the others, without gradient."""

    total: torch.Tensor
    each: torch.Tensor


class OutputHead(ColumnParallel):
    """From normed hidden states to logits or losses; of its local columns the first
    ``true_columns`` are no padding.

    ``tied`` gives the embedding's weight where the head has none of its own. It is asked for inside
    the module's call: an engine that divides weights over ranks gathers them for a call.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        config: TransformerConfig,
        true_columns: int,
        tied: Callable[[], torch.nn.Parameter] | None = None,
    ) -> None:
        super().__init__(input_size, output_size, config, own_weight=tied is None)
        self.true_columns = true_columns
        self.tied = tied

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor | TokenLosses:
        """``hidden`` ``[s, b, h]`` (this rank's part of s under sequence parallelism) -> logits
        ``[s, b, local columns]``, padded ones -inf, or with labels their losses; ``labels``,
        ``counted`` (None: all) ``[b, s]``."""
        weight = self.weight if self.tied is None else self.tied()
        if labels is None:
            return mask_padding(self.project(hidden, weight), self.true_columns)
        if counted is None:
            counted = torch.ones_like(labels, dtype=torch.bool)
        if labels.numel() * weight.shape[0] > logits_per_chunk(hidden.device):
            return self._losses_in_chunks(hidden, weight, labels, counted)
        logits = mask_padding(self.project(hidden, weight), self.true_columns)
        losses = vocab_parallel_cross_entropy(logits, labels.t().contiguous()).t()
        each = torch.where(counted, losses, 0.0)
        return TokenLosses(each.sum(), each.detach())

    def _losses_in_chunks(
        self,
        hidden: torch.Tensor,
        weight: torch.nn.Parameter,
        labels: torch.Tensor,
        counted: torch.Tensor,
    ) -> TokenLosses:
        group = self.tp_group
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        elif group.size() > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        target, buffer = gradient_target(weight)
        total, each = _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1),
            target,
            _Chunks(
                labels.t().flatten(),
                counted.t().flatten(),
                self.true_columns,
                group,
                torch.is_grad_enabled(),
                buffer,
            ),
        )
        return TokenLosses(total, each.view(labels.shape[::-1]).t())


def mask_padding(logits: torch.Tensor, true_columns: int) -> torch.Tensor:
    """Columns beyond the true vocabulary take no part in the softmax."""
    if true_columns < logits.shape[-1]:
        logits[..., true_columns:] = float("-inf")
    return logits


class _Chunks(NamedTuple):
    """What the loss needs besides tensors with a gradient: ``labels`` and ``counted`` ``[n]``;
    ``buffer``: where the weight's gradient is added, None where autograd takes it."""

    labels: torch.Tensor
    counted: torch.Tensor
    true_columns: int
    group: Any
    learns: bool
    buffer: torch.Tensor | None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """``x`` ``[n, h]``, local ``weight`` ``[columns, h]`` -> sum of the losses, losses ``[n]``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, chunks: _Chunks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = x.new_empty(len(x), dtype=torch.float32)
        rows = max(1, logits_per_chunk(x.device) // weight.shape[0])
        if chunks.learns:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            losses[part], grad = _loss_and_gradient(x[part], weight, part, chunks)
            if chunks.learns:
                torch.mm(grad, weight, out=grad_x[part])
                add_product_(grad_weight, grad.t(), x[part])
        if chunks.learns:
            ctx.save_for_backward(grad_x, grad_weight)
            ctx.weight_dtype, ctx.buffer = weight.dtype, chunks.buffer
        losses = torch.where(chunks.counted, losses, 0.0)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        if ctx.buffer is None:
            return grad_x * grad.to(grad_x.dtype), (grad_weight * grad).to(ctx.weight_dtype), None
        ctx.buffer.addcmul_(grad_weight, grad)
        return grad_x * grad.to(grad_x.dtype), None, None


def _loss_and_gradient(
    x: torch.Tensor, weight: torch.Tensor, part: slice, chunks: _Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses ``[rows]``, and the gradient of their counted sum by the logits ``[rows, columns]``,
    in the type of ``x``."""
    columns, group = weight.shape[0], chunks.group
    logits = mask_padding(torch.mm(x, weight.t()).float(), chunks.true_columns)
    largest = logits.amax(-1)
    if group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits -= largest[:, None]
    target = chunks.labels[part] - group.rank() * columns
    is_here = (target >= 0) & (target < columns)
    row, target = torch.arange(len(x), device=x.device), target.clamp(0, columns - 1)
    predicted = torch.where(is_here, logits[row, target], 0.0)
    exponentials = logits.exp_()
    sums = torch.stack((exponentials.sum(-1), predicted))
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    softmax = exponentials.div_(sums[0][:, None])
    softmax[row, target] -= is_here.float()
    gradient = softmax.mul_(chunks.counted[part, None])
    return sums[0].log() - sums[1], gradient.to(x.dtype)
