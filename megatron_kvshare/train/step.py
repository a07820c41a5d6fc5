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
from megatron_kvshare.megatron_api.schedule import finalize_gradients, run_schedule
from megatron_kvshare.model.kv import relative_change
from megatron_kvshare.pipeline.spanning import Ran
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import (
    EXACT_RESIDUAL_BF16,
    EXACT_RESIDUAL_FP32,
    Recipe,
    Solver,
    exact_plan,
    solver_plan,
)
from megatron_kvshare.train.anomaly import vote
from megatron_kvshare.train.pulse import VALIDATION
from megatron_kvshare.train.run import Bad, Orders, Run, StepResult

_EXACT_ROUND_THE_PIPELINE = Recipe(
    solver=Solver.STRIDED, stride=8, forward_sweeps=7, backward_sweeps=1
)
"""Where sweeps go round the pipeline their number is fixed; eight leave nothing to see in the loss
(docs/solvers.md: four differ by 3e-6)."""


class How(NamedTuple):
    """The sweeps of a forward, and whether to measure how far each moves the shared KV."""

    plan: ExecutionPlan
    measure_residual: bool


def train_step(
    run: Run, batches: Iterator[Batch], step: int, orders: Orders | None = None
) -> StepResult:
    """Forward and backward over one global batch, then AdamW unless the step is a bad one."""
    orders = orders or Orders()
    zero_gradients(run.models, run.optimizer)
    lr = set_learning_rate(run.scheduler, step)
    how = How(run.plan, orders.measure_residual)
    sums = _run_batches(run, batches, run.planned.batch.num_microbatches, how).sum(0)
    loss = _mean_loss(sums)
    grad_norm = gradient_norm(run.optimizer)
    finite, stop = vote((loss, grad_norm), orders.stop, run.state)
    skipped: Bad = "nan" if not finite else "spike" if loss > orders.loss_limit else ""
    if not skipped:
        update_parameters(run.models, run.optimizer, run.config.train.clip_grad, grad_norm)
    residuals = _residuals(run, sums[2:]) if orders.measure_residual else ()
    return StepResult(loss, lr, grad_norm, residuals, skipped, stop)


class Evaluation(NamedTuple):
    """``loss``: mean per unmasked token over the validation batches, the same ones every time.

    ``kv_gap``: loss under exact evaluation, as decoding computes it, minus ``loss``, both over the
    first ``--kv-gap-iters`` batches; None for maps without sweeps. ``kv_residuals``: of every
    sweep, see :class:`StepResult`.
    """

    loss: float
    kv_gap: float | None
    kv_residuals: tuple[float, ...]


@torch.no_grad()
def evaluate(run: Run) -> Evaluation:
    """Loss by the sweeps of an evaluation, and how far it is from exact."""
    train, sharing = run.config.train, run.config.sharing
    gap_iters = min(sharing.kv_gap_iters, train.eval_iters) if run.plan.map.is_cyclic else 0
    for model in run.models:
        model.eval()
    with gathered_parameters(run.models):
        rows = _validation_sums(run, run.planned.evaluation_plan, train.eval_iters)
        gap = None
        if gap_iters:
            first = rows[: gap_iters * run.planned.batch.num_microbatches]
            gap = validate(run, _exact_plan(run), gap_iters).loss - _mean_loss(first.sum(0))
    for model in run.models:
        model.train()
    return _evaluation(run, run.planned.evaluation_plan, rows)._replace(kv_gap=gap)


def _exact_plan(run: Run) -> ExecutionPlan:
    residual = EXACT_RESIDUAL_BF16 if run.config.model.bf16 else EXACT_RESIDUAL_FP32
    if run.spanning:
        return solver_plan(run.plan.map, _EXACT_ROUND_THE_PIPELINE)
    length, parallel = run.config.model.seq_length, run.config.parallel
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return exact_plan(run.plan.map, length, residual, ranks)


def validate(run: Run, plan: ExecutionPlan, batches: int) -> Evaluation:
    """The first global batches of the validation split, by ``plan``; no gradient, no gap."""
    return _evaluation(run, plan, _validation_sums(run, plan, batches))


def _validation_sums(run: Run, plan: ExecutionPlan, batches: int) -> torch.Tensor:
    count = batches * run.planned.batch.num_microbatches
    how = How(plan, bool(plan.groups))
    return _run_batches(run, run.data.valid_batches(), count, how, forward_only=True)


def _evaluation(run: Run, plan: ExecutionPlan, rows: torch.Tensor) -> Evaluation:
    sums = rows.sum(0)
    return Evaluation(_mean_loss(sums), None, _residuals(run, sums[2:]) if plan.groups else ())


def _run_batches(
    run: Run,
    batches: Iterator[Batch],
    count: int,
    how: How,
    forward_only: bool = False,
) -> torch.Tensor:
    """fp64 sums over ranks, a row for each microbatch: token losses, unmasked tokens, residuals."""
    there = _announced(run, batches, VALIDATION if forward_only else "forward and backward")
    sums_of = _by_tasks if run.spanning else _by_schedule
    sums = sums_of(run, there, count, how, forward_only)
    return all_reduce_(all_reduce_(sums, run.state.dp_group), run.state.pp_group)


def _by_schedule(
    run: Run, batches: Iterator[Batch], count: int, how: How, forward_only: bool
) -> torch.Tensor:
    """Stages one after another, by megatron-core's schedules."""
    rows: dict[torch.nn.Module, list[torch.Tensor]] = {chunk: [] for chunk in run.chunks}

    def chunk_step(batch: Batch, chunk: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        output, payload = chunk(
            batch.tokens,
            batch.labels,
            batch.position_ids,
            batch.document_ids,
            measure_residual=how.measure_residual,
            plan=how.plan,
        )
        if payload is not None:  # a stage below the last has no loss
            nothing = payload.new_zeros((), dtype=torch.float64)
            rows[chunk].append(_row(nothing, nothing, output.residuals))
            return payload, nothing.int()
        losses, num_tokens = _counted(batch, output.value)
        rows[chunk].append(_row(losses.detach().double().sum(), num_tokens, output.residuals))
        return losses.sum(), num_tokens.int()

    cuts = [chunk.cuts for chunk in run.chunks]
    run_schedule(run.chunks, run.models, batches, chunk_step, count, cuts, forward_only)
    return torch.stack([torch.stack(each) for each in rows.values()]).sum(0)


def _by_tasks(
    run: Run, batches: Iterator[Batch], count: int, how: How, forward_only: bool
) -> torch.Tensor:
    """Cyclic groups round the pipeline, by the tasks of their sweeps."""
    assert run.spanning is not None
    nothing = torch.zeros((), dtype=torch.float64, device=run.state.platform.device)

    def loss_of(batch: Batch, value: torch.Tensor) -> tuple[torch.Tensor, Any]:
        losses, num_tokens = _counted(batch, value)
        return losses.sum(), (losses.detach().double().sum(), num_tokens)

    ran: list[Ran] = []
    while len(ran) < count:  # one order for each global batch, evaluations have many
        some = min(run.planned.batch.num_microbatches, count - len(ran))
        more = (loss_of, how.measure_residual, forward_only)
        ran += run.spanning.run(how.plan, batches, some, *more)
    sums = [each.result or (nothing, nothing) for each in ran]
    if not forward_only:
        num_tokens = torch.stack([tokens for _, tokens in sums]).sum()
        finalize_gradients(run.models, num_tokens.int())
    pairs = zip(sums, ran, strict=True)
    return torch.stack([_row(*both, each.residuals) for both, each in pairs])


def _counted(batch: Batch, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the tokens that count, 0 for the others, and how many count."""
    counted = batch.loss_mask > 0
    return torch.where(counted, value, 0.0), counted.sum()


def _row(
    loss: torch.Tensor, num_tokens: torch.Tensor, residuals: torch.Tensor | None
) -> torch.Tensor:
    sums = [loss, num_tokens.double()]
    return torch.stack(sums if residuals is None else [*sums, *residuals.flatten().unbind()])


def _announced(run: Run, batches: Iterator[Batch], what: str) -> Iterator[Batch]:
    for batch in batches:
        run.pulse.beat(what)
        yield _to_device(batch, run.state.platform.device)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in batch))


def _mean_loss(sums: torch.Tensor) -> float:
    loss_sum, num_tokens = sums[:2].tolist()
    return loss_sum / num_tokens if num_tokens else 0.0


def _residuals(run: Run, sums: torch.Tensor) -> tuple[float, ...]:
    """Of the worst group, after each sweep that ran; tensor-parallel ranks sum their heads."""
    rows = all_reduce_(sums.clone(), run.state.tp_group).reshape(len(run.plan.groups), -1, 2)
    sweeps = ([row for row in each if row[1] > 0] for each in rows.transpose(0, 1))
    return tuple(max(map(relative_change, ran)) for ran in sweeps if ran)
