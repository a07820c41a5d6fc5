"""One optimizer step and one evaluation, top to bottom (L5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.megatron_api.optimizer import (
    gathered_parameters,
    gradient_norm,
    set_learning_rate,
    update_parameters,
    zero_gradients,
)
from megatron_kvshare.megatron_api.parallel import all_reduce_
from megatron_kvshare.megatron_api.schedule import run_schedule
from megatron_kvshare.train.guards import all_finite
from megatron_kvshare.train.run import Run


class StepResult(NamedTuple):
    """``loss``: mean over the unmasked tokens of the global batch, whatever its split over ranks.

    ``kv_residual``: how far the shared keys and values of the worst cyclic group moved in the last
    pass, ``||KV_n - KV_{n-1}|| / ||KV_n||``; None unless measured. ``skipped``: the weights were
    left as they were.
    """

    loss: float
    lr: float
    grad_norm: float
    kv_residual: float | None
    skipped: bool


def train_step(
    run: Run, batches: Iterator[Batch], step: int, measure_residual: bool = False
) -> StepResult:
    """Forward and backward over one global batch, then AdamW unless something is NaN or Inf."""
    zero_gradients(run.model, run.optimizer)
    lr = set_learning_rate(run.scheduler, step)
    sums = _run_batches(run, batches, run.layout.num_microbatches, measure_residual)
    loss = _mean_loss(sums)
    grad_norm = gradient_norm(run.optimizer)
    finite = all_finite((loss, grad_norm), run.state)
    if finite:
        update_parameters(run.model, run.optimizer, run.config.train.clip_grad, grad_norm)
    residual = _residual(run, sums[2:]) if measure_residual else None
    return StepResult(loss, lr, grad_norm, residual, skipped=not finite)


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss per unmasked token over the validation batches, the same ones every time."""
    count = run.config.train.eval_iters * run.layout.num_microbatches
    run.model.eval()
    with gathered_parameters(run.model):
        sums = _run_batches(run, run.data.valid_batches(), count, forward_only=True)
    run.model.train()
    return _mean_loss(sums)


def _run_batches(
    run: Run,
    batches: Iterator[Batch],
    count: int,
    measure_residual: bool = False,
    forward_only: bool = False,
) -> torch.Tensor:
    """fp64 sums over all ranks' batches: token losses, unmasked tokens, each group's residual."""

    def microbatch_loss(
        batch: Batch, model: torch.nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = _to_device(batch, run.state.platform.device)
        output = model(
            batch.tokens,
            batch.labels,
            batch.position_ids,
            batch.document_ids,
            measure_residual=measure_residual,
        )
        counted = batch.loss_mask > 0
        losses = torch.where(counted, output.value, 0.0)
        num_tokens = counted.sum()
        sums = [losses.detach().double().sum(), num_tokens.double()]
        if output.residuals is not None:
            sums += output.residuals.flatten().unbind()
        return losses.sum(), num_tokens.int(), torch.stack(sums)

    results = run_schedule(run.model, batches, microbatch_loss, count, forward_only)
    return all_reduce_(torch.stack(results).sum(0), run.state.dp_group)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in batch))


def _mean_loss(sums: torch.Tensor) -> float:
    loss_sum, num_tokens = sums[:2].tolist()
    return loss_sum / num_tokens if num_tokens else 0.0


def _residual(run: Run, sums: torch.Tensor) -> float:
    """The worst group's residual; every tensor-parallel rank has summed its own heads."""
    changes = all_reduce_(sums.clone(), run.state.tp_group).reshape(-1, 2).tolist()
    return max(math.sqrt(change / total) if total else 0.0 for change, total in changes)
