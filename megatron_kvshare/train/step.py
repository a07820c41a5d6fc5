"""One optimizer step, top to bottom."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.megatron_api.parallel import all_reduce_
from megatron_kvshare.model.kv import relative_change
from megatron_kvshare.pipeline.runner import Pass, Sums
from megatron_kvshare.train.agreement import vote
from megatron_kvshare.train.run import Bad, Orders, Run, StepResult


def train_step(
    run: Run, batches: Iterator[Batch], step: int, orders: Orders | None = None
) -> StepResult:
    """Forward and backward over one global batch, then AdamW unless the step is a bad one."""
    orders = orders or Orders()
    lr = run.engine.set_learning_rate(step)
    how = Pass(run.plan, orders.measure_residual)
    sums = run.engine.forward_backward(on_device(run, batches, "forward and backward"), how)
    grad_norm = run.engine.gradient_norm()
    loss = sums.mean_loss
    finite, stop = vote((loss, grad_norm), orders.stop, run.state)
    skipped: Bad = "nan" if not finite else "spike" if loss > orders.loss_limit else ""
    if not skipped:
        run.engine.update(grad_norm)
    return StepResult(loss, lr, grad_norm, kv_residuals(run, sums), skipped, stop)


def on_device(run: Run, batches: Iterator[Batch], what: str) -> Iterator[Batch]:
    """The batches where the model is; ``what`` this rank does with them."""
    device = run.state.platform.device
    for batch in batches:
        run.pulse.beat(what)
        yield Batch(*(None if x is None else x.to(device, non_blocking=True) for x in batch))


def kv_residuals(run: Run, sums: Sums) -> tuple[float, ...]:
    """Of the worst group, after each sweep that ran; empty where not measured. Tensor-parallel
    ranks sum their heads."""
    if sums.residuals is None:
        return ()
    rows = all_reduce_(sums.residuals.sum(0), run.state.tp_group)
    sweeps = ([row for row in each if row[1] > 0] for each in rows.transpose(0, 1))
    return tuple(max(map(relative_change, ran)) for ran in sweeps if ran)
