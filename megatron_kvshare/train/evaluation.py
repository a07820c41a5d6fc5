"""Validation during a run, and how far it is from exact."""

from __future__ import annotations

from typing import NamedTuple

from megatron_kvshare.megatron_api.datasets import DataPart
from megatron_kvshare.pipeline.runner import Pass, Sums
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import (
    EXACT_RESIDUAL_BF16,
    EXACT_RESIDUAL_FP32,
    Recipe,
    Solver,
    exact_plan,
    solver_plan,
)
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.step import kv_residuals, on_device
from megatron_kvshare.train.watchdog import VALIDATION

_EXACT_ROUND_THE_PIPELINE = Recipe(
    solver=Solver.STRIDED, stride=8, forward_sweeps=7, backward_sweeps=1
)
"""Where sweeps go round the pipeline their number is fixed; eight leave nothing to see in the loss
(docs/solvers.md: four differ by 3e-6)."""


class Evaluation(NamedTuple):
    """``loss``: mean per unmasked token over the validation batches, the same ones every time.

    ``kv_gap``: loss under exact evaluation, as decoding computes it, minus ``loss``, both over the
    first ``--kv-gap-iters`` batches; None for maps without sweeps. ``kv_residuals``: of every
    sweep, see :class:`~megatron_kvshare.train.run.StepResult`.
    """

    loss: float
    kv_gap: float | None
    kv_residuals: tuple[float, ...]


def evaluate(run: Run, part: DataPart = DataPart.valid) -> Evaluation:
    """Loss by the sweeps of an evaluation, and how far it is from exact; of test data the loss
    alone."""
    train, sharing = run.config.train, run.config.sharing
    measures_gap = run.plan.map.is_cyclic and part is DataPart.valid
    gap_iters = min(sharing.kv_gap_iters, train.eval_iters) if measures_gap else 0
    gap = None
    for stage in run.engine.stages:
        stage.eval()
    with run.engine.evaluating():
        sums = evaluation_sums(run, run.planned.evaluation_plan, train.eval_iters, part)
        if gap_iters:
            exact = evaluation_sums(run, _exact_plan(run), gap_iters)
            same = sums.first(gap_iters * run.planned.batch.num_microbatches)
            gap = exact.mean_loss - same.mean_loss
    for stage in run.engine.stages:
        stage.train()
    return Evaluation(sums.mean_loss, gap, kv_residuals(run, sums))


def evaluation_sums(
    run: Run, plan: ExecutionPlan, batches: int, part: DataPart = DataPart.valid
) -> Sums:
    """Of the first global batches of ``part``, by ``plan``; inside
    :meth:`~megatron_kvshare.engines.engine.Engine.evaluating`."""
    how = Pass(plan, measure_residual=bool(plan.groups), forward_only=True)
    data = run.data.test_batches() if part is DataPart.test else run.data.valid_batches()
    return run.engine.evaluate(on_device(run, data, VALIDATION), how, batches)


def _exact_plan(run: Run) -> ExecutionPlan:
    residual = EXACT_RESIDUAL_BF16 if run.config.model.bf16 else EXACT_RESIDUAL_FP32
    if run.planned.placement.spanning_groups:
        return solver_plan(run.plan.map, _EXACT_ROUND_THE_PIPELINE)
    length, parallel = run.config.model.seq_length, run.config.parallel
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return exact_plan(run.plan.map, length, residual, ranks)
