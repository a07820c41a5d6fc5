"""One optimizer step and one evaluation, top to bottom (L5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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
from megatron_kvshare.model.kv import relative_change
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import exact_plan
from megatron_kvshare.train.guards import all_finite
from megatron_kvshare.train.run import Run

_EXACT_RESIDUAL_FP32, _EXACT_RESIDUAL_BF16 = 1e-6, 4e-3
"""KV that move by less have converged: about the rounding of one sweep."""


class StepResult(NamedTuple):
    """``loss``: mean over the unmasked tokens of the global batch, whatever its split over ranks.

    ``kv_residuals``: for every pass how far it moved the shared keys and values,
    ``||KV_n - KV_{n-1}|| / ||KV_n||``, of the cyclic group that moved furthest; empty unless
    measured. ``skipped``: the weights were left as they were.
    """

    loss: float
    lr: float
    grad_norm: float
    kv_residuals: tuple[float, ...]
    skipped: bool


def train_step(
    run: Run, batches: Iterator[Batch], step: int, measure_residual: bool = False
) -> StepResult:
    """Forward and backward over one global batch, then AdamW unless something is NaN or Inf."""
    zero_gradients(run.model, run.optimizer)
    lr = set_learning_rate(run.scheduler, step)
    how = {"measure_residual": measure_residual}
    sums = _run_batches(run, batches, run.layout.num_microbatches, how)
    loss = _mean_loss(sums)
    grad_norm = gradient_norm(run.optimizer)
    finite = all_finite((loss, grad_norm), run.state)
    if finite:
        update_parameters(run.model, run.optimizer, run.config.train.clip_grad, grad_norm)
    residuals = _residuals(run, sums[2:]) if measure_residual else ()
    return StepResult(loss, lr, grad_norm, residuals, skipped=not finite)


class Evaluation(NamedTuple):
    """``loss``: mean per unmasked token over the validation batches, the same ones every time.

    ``kv_gap``: loss under exact evaluation, as decoding computes it, minus ``loss``, both over the
    first ``--kv-gap-iters`` batches; None for maps without passes. ``kv_residuals``: of every pass,
    see :class:`StepResult`.
    """

    loss: float
    kv_gap: float | None
    kv_residuals: tuple[float, ...]


@torch.no_grad()
def evaluate(run: Run) -> Evaluation:
    """Loss by the passes of an evaluation, and how far it is from exact."""
    train, sharing = run.config.train, run.config.sharing
    gap_iters = min(sharing.kv_gap_iters, train.eval_iters) if run.plan.map.is_cyclic else 0
    run.model.eval()
    with gathered_parameters(run.model):
        found = validate(run, run.evaluation_plan, train.eval_iters)
        gap = _gap(run, gap_iters) if gap_iters else None
    run.model.train()
    return found._replace(kv_gap=gap)


def _gap(run: Run, batches: int) -> float:
    residual = _EXACT_RESIDUAL_BF16 if run.config.model.bf16 else _EXACT_RESIDUAL_FP32
    length, parallel = run.config.model.seq_length, run.config.parallel
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    exact = exact_plan(run.plan.map, length, residual, ranks)
    return validate(run, exact, batches).loss - validate(run, run.evaluation_plan, batches).loss


def validate(run: Run, plan: ExecutionPlan, batches: int) -> Evaluation:
    """The first global batches of the validation split, by ``plan``; no gradient, no gap."""
    count = batches * run.layout.num_microbatches
    how = {"plan": plan, "measure_residual": bool(plan.groups)}
    sums = _run_batches(run, run.data.valid_batches(), count, how, forward_only=True)
    return Evaluation(_mean_loss(sums), None, _residuals(run, sums[2:]) if plan.groups else ())


def _run_batches(
    run: Run,
    batches: Iterator[Batch],
    count: int,
    how: dict[str, Any],
    forward_only: bool = False,
) -> torch.Tensor:
    """fp64 sums over all ranks' batches: token losses, unmasked tokens, residuals; ``how``: further
    arguments of the model."""

    def microbatch_loss(
        batch: Batch, model: torch.nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = _to_device(batch, run.state.platform.device)
        output = model(batch.tokens, batch.labels, batch.position_ids, batch.document_ids, **how)
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


def _residuals(run: Run, sums: torch.Tensor) -> tuple[float, ...]:
    """Of the worst group, after each pass that ran; tensor-parallel ranks sum their heads."""
    rows = all_reduce_(sums.clone(), run.state.tp_group).reshape(len(run.plan.groups), -1, 2)
    passes = ([row for row in each if row[1] > 0] for each in rows.transpose(0, 1))
    return tuple(max(map(relative_change, ran)) for ran in passes if ran)
