"""The training loop (L5), whole."""

from __future__ import annotations

import sys
from dataclasses import replace

from megatron_kvshare.config.shape import recipe
from megatron_kvshare.train.guards import NanGuard
from megatron_kvshare.train.metrics import Metrics, residual_fields
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.setup import save
from megatron_kvshare.train.step import StepResult, evaluate, train_step


def train(run: Run, metrics: Metrics) -> float | None:
    """Train up to ``train_iters``; returns the loss of the final evaluation, or None."""
    train, log, checkpoint = run.config.train, run.config.log, run.config.checkpoint
    guard = NanGuard(train, run.state)
    batches = run.data.train_batches(run.progress.samples)
    valid_loss = None

    while (step := run.progress.step + 1) <= train.train_iters:
        last = step == train.train_iters or _due(step, train.exit_interval)
        logged = last or _due(step, log.log_interval)
        result = train_step(run, batches, step, logged and _wants_residual(run))

        advance(run, metrics, result)
        guard.after_step(step, result.loss, result.grad_norm, result.skipped)
        if logged or result.skipped:
            extra = residual_fields(result.kv_residuals) | {"skipped": result.skipped or None}
            metrics.train(run.progress, result.loss, result.lr, result.grad_norm, **extra)
        with metrics.watch.paused():
            if train.eval_iters and (last or _due(step, train.eval_interval)):
                found = evaluate(run)
                valid_loss = found.loss
                metrics.valid(
                    step, found.loss, kv_gap=found.kv_gap, **residual_fields(found.kv_residuals)
                )
                warn_of_gap(run, found.kv_gap)
            if checkpoint.save and (last or _due(step, checkpoint.save_interval)):
                save(run)
        if last:
            break
    if train.eval_iters and valid_loss is None:  # a resumed run that had nothing left to train
        valid_loss = evaluate(run).loss
    return valid_loss


def advance(run: Run, metrics: Metrics, result: StepResult) -> None:
    """Count one step: its samples and tokens are used up, whether or not it changed the weights."""
    samples = run.layout.global_batch_size
    tokens = samples * run.config.model.seq_length
    run.progress = replace(
        run.progress,
        step=run.progress.step + 1,
        samples=run.progress.samples + samples,
        tokens=run.progress.tokens + tokens,
        skipped_steps=run.progress.skipped_steps + result.skipped,
    )
    metrics.watch.add_step(tokens)


def warn_of_gap(run: Run, gap: float | None) -> None:
    """Say it when decoding, which is exact, does not compute what training does."""
    limit = run.config.sharing.kv_gap_warning
    if gap is None or abs(gap) <= limit or not run.state.is_first:
        return
    passes = recipe(run.config.sharing).forward_passes
    print(
        f"warning: the exact loss, which decoding has, is {gap:+.4f} from the loss after this run's"
        f" passes (--kv-gap-warning {limit:g}). Raise --kv-forward-passes above {passes}, or use"
        " --kv-recipe fast or paper.",
        file=sys.stderr,
        flush=True,
    )


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _wants_residual(run: Run) -> bool:
    return run.config.log.log_kv_residual and run.plan.map.is_cyclic
