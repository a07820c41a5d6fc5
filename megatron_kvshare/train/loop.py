"""The training loop, whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_kvshare.checkpoint.manifest import Alarm
from megatron_kvshare.megatron_api.datasets import DataPart
from megatron_kvshare.sharing.solver import with_more_sweeps
from megatron_kvshare.train.agreement import LOST, StopWish, reason, together, warn
from megatron_kvshare.train.anomaly import (
    after_step,
    check_has_not_diverged,
    divergence_text,
    fatal,
    loss_limit,
    write_down,
)
from megatron_kvshare.train.evaluation import evaluate
from megatron_kvshare.train.metrics import Metrics, memory_fields, residual_fields
from megatron_kvshare.train.profiling import Profiling
from megatron_kvshare.train.run import Orders, Run, StepResult
from megatron_kvshare.train.saving import save, settle
from megatron_kvshare.train.step import train_step


class FinalLosses(NamedTuple):
    """Of the evaluations at the end of a run; None where there was none: evaluation is off, or the
    run was stopped before its end, or there is no test data."""

    valid: float | None = None
    test: float | None = None


def train(run: Run, metrics: Metrics, wish: StopWish, profiling: Profiling) -> FinalLosses:
    """Train up to ``train_iters``, or until ``wish``.

    Raises:
        TrainingError: too many bad steps, or one where the policy is to stop, or divergence where
            the policy is to stop (saved before), or in an earlier part of such a run.
        OwnershipError: another run has taken over what this one writes to.
    """
    train, log, checkpoint = run.config.train, run.config.log, run.config.checkpoint
    with together(run.state):
        check_has_not_diverged(train, run.progress.health)
    batches = run.data.train_batches(run.progress.samples)
    valid_loss = None

    while (step := run.progress.step + 1) <= train.train_iters:
        last = step == train.train_iters or _due(step, train.exit_interval)
        logged = last or _due(step, log.log_interval)
        run.pulse.beat("waiting for data", step)
        limit = loss_limit(train, run.progress.health)
        orders = Orders(logged and _wants_residual(run), limit, wish.now())
        with profiling.step(step):
            result = train_step(run, batches, step, orders)
        if result.stop == LOST:
            with together(run.state):
                run.owner.check()

        alarms = advance(run, metrics, result)
        error = fatal(train, run.progress, result, alarms)
        stop = error is not None or (result.stop != 0 and not last)
        if logged or stop or result.skipped or alarms:
            marks = {"skipped": bool(result.skipped) or None, "diverging": bool(alarms) or None}
            extra = residual_fields(result.kv_residuals) | memory_fields(run.state) | marks
            extra |= {"data_stage": _data_stage(run)}
            metrics.train(run.progress, result.loss, result.lr, result.grad_norm, **extra)
        with metrics.watch.paused():
            if train.eval_iters and not stop and (last or _due(step, train.eval_interval)):
                valid_loss = _validate(run, metrics)
            if checkpoint.save and (last or stop or _due(step, checkpoint.save_interval)):
                save(run, last=last or stop, remove_older=error is None)
            settle(run)
        if error is not None:
            with together(run.state):
                raise error
        if last or stop:
            run.stopped_by = _stopped_by(run, result)
            if stop:
                return FinalLosses()
            if (test_loss := _test(run)) is not None:
                metrics.test(step, test_loss)
            return FinalLosses(valid_loss, test_loss)
    # A run that was resumed with nothing left to train.
    return FinalLosses(evaluate(run).loss if train.eval_iters else None, _test(run))


def advance(run: Run, metrics: Metrics, result: StepResult) -> Sequence[Alarm]:
    """Count one step: its samples and tokens are used up, whether or not it changed the weights.

    Returns the signs of divergence that are new with it; each has been told.
    """
    samples, before = run.planned.batch.global_batch_size, run.progress.health
    tokens = samples * run.config.model.seq_length
    step, clip_grad = run.progress.step + 1, run.config.train.clip_grad
    run.progress = replace(
        run.progress,
        step=step,
        samples=run.progress.samples + samples,
        tokens=run.progress.tokens + tokens,
        skipped_steps=run.progress.skipped_steps + bool(result.skipped),
        tokens_by_source=_tokens_by_source(run, samples),
        health=after_step(before, result, step, clip_grad, run.spec.vocab_size),
    )
    metrics.watch.add_step(tokens)
    if result.skipped:
        write_down(run, result)
    alarms = run.progress.health.alarms[len(before.alarms) :]
    for alarm in alarms:
        warn(run.state, divergence_text(alarm, run.planned))
    return alarms


def _tokens_by_source(run: Run, samples: int) -> dict[str, int]:
    """With those of the step that has just ended."""
    known, first = run.progress.tokens_by_source, run.progress.samples
    new = run.data.tokens_by_source(first, first + samples)
    return known | {source: known.get(source, 0) + count for source, count in new.items()}


def _data_stage(run: Run) -> int | None:
    """The stage of the data, from 1, that the last step ended in; None where there is one only."""
    if not run.planned.data_stages:
        return None
    return run.data.stage_of(run.progress.samples - 1) + 1


def _test(run: Run) -> float | None:
    """On test data, at the end of the last step and there only."""
    is_over = run.progress.step >= run.config.train.train_iters
    reads = DataPart.test in run.data.plan.parts
    return evaluate(run, DataPart.test).loss if is_over and reads else None


def _validate(run: Run, metrics: Metrics) -> float:
    found = evaluate(run)
    residuals = residual_fields(found.kv_residuals)
    metrics.valid(run.progress.step, found.loss, kv_gap=found.kv_gap, **residuals)
    warn_of_gap(run, found.kv_gap)
    return found.loss


def _stopped_by(run: Run, result: StepResult) -> str:
    if run.progress.step == run.config.train.train_iters:
        return ""
    return reason(result.stop) if result.stop else "--exit-interval"


def warn_of_gap(run: Run, gap: float | None) -> None:
    """Say it when decoding, which is exact, does not compute what training does."""
    limit = run.config.sharing.kv_gap_warning
    if gap is None or abs(gap) <= limit:
        return
    trained = run.planned.recipe
    flags = (with_more_sweeps(trained), f"--kv-forward-sweeps above {trained.forward_sweeps}")
    warn(
        run.state,
        f"the exact loss, which decoding has, is {gap:+.4f} from the loss after this run's"
        f" sweeps (--kv-gap-warning {limit:g}). Train with more of them:"
        f" {', or '.join(filter(None, flags))}.",
    )


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _wants_residual(run: Run) -> bool:
    return run.config.log.log_kv_residual and run.plan.map.is_cyclic
