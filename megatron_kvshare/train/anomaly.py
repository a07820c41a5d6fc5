"""Steps and runs that go wrong: NaN and Inf, sudden jumps of the loss, divergence.

Three policies, each ``--...-policy``: a step with NaN or Inf and a loss that jumps must not change
the weights (``nan``, ``loss-spike``); a run that diverges has changed them already, and says so
(``divergence``). What they need to remember is :class:`Health`, which checkpoints carry.

The same decision on every rank: loss and gradient norm are sums over all ranks already, and what a
single rank sees is voted on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

from megatron_kvshare.checkpoint.manifest import Alarm, Health, Progress
from megatron_kvshare.config import TrainConfig
from megatron_kvshare.errors import DivergenceError, Fault, TrainingError
from megatron_kvshare.sharing.solver import with_more_sweeps
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.agreement import warn
from megatron_kvshare.train.run import Run, StepResult
from megatron_kvshare.train.sinks import append_line

WINDOW = 100
"""Losses and gradient norms that are remembered: what a new one is compared with."""
_ENOUGH_LOSSES = 10
"""Losses without which their mean says nothing about a spike."""
SKIPPED_BATCHES = "skipped_batches.jsonl"
"""File in the ``--save`` folder that names the samples of every step that was skipped."""

HUGE_NORM = 1e4
"""No healthy step has a gradient norm above this many times max(1, ``--clip-grad``)."""
NORM_JUMP, ENOUGH_NORMS = 100.0, 20
"""Nor one above so many times the median of at least so many steps before it."""
LOSS_STEPS, LOSS_RISE = 20, 0.5
"""The mean loss of the last steps is not above that of the first ones by more."""
FRESH_STEPS, FRESH_MARGIN = 5, 1.0
"""New weights begin near log(vocabulary): a mean above it by more has learned something wrong."""


def loss_limit(train: TrainConfig, health: Health) -> float:
    """The loss above which the next step is a spike."""
    if train.loss_spike_factor is None or len(health.recent_losses) < _ENOUGH_LOSSES:
        return math.inf
    return train.loss_spike_factor * fmean(health.recent_losses)


def after_step(
    health: Health, result: StepResult, step: int, clip_grad: float, vocab_size: int
) -> Health:
    """``health`` after ``step``, with an alarm more for every sign of divergence that is new.

    A step that was skipped changed no weights: its loss and norm are not remembered.
    """
    if result.skipped:
        return replace(health, skipped_in_a_row=health.skipped_in_a_row + 1)
    seen = replace(
        health,
        skipped_in_a_row=0,
        recent_losses=(*health.recent_losses, result.loss)[-WINDOW:],
        first_losses=(*health.first_losses, result.loss)[:LOSS_STEPS],
    )
    known = {alarm.cause for alarm in health.alarms}
    signs = (
        *_signs_of_norm(health.recent_norms, result.grad_norm, clip_grad),
        *_signs_of_loss(seen, vocab_size),
    )
    new = (Alarm(cause, step, what) for cause, what in signs if cause not in known)
    norms = (*health.recent_norms, result.grad_norm)[-WINDOW:]
    return replace(seen, recent_norms=norms, alarms=(*health.alarms, *new))


def _signs_of_norm(
    before: Sequence[float], norm: float, clip_grad: float
) -> Iterator[tuple[str, str]]:
    limit = HUGE_NORM * max(1.0, clip_grad)
    if norm > limit:
        text = f"the gradient norm before clipping is {norm:.3g}, above {HUGE_NORM:g}"
        yield "huge gradient norm", f"{text} x max(1, --clip-grad {clip_grad:g})"
    if len(before) >= ENOUGH_NORMS and norm > NORM_JUMP * (usual := median(before)) > 0:
        text = f"the gradient norm before clipping is {norm:.3g}, {norm / usual:,.0f} times the"
        yield "jump of the gradient norm", f"{text} median {usual:.3g} of {len(before)} steps"


def _signs_of_loss(health: Health, vocab_size: int) -> Iterator[tuple[str, str]]:
    first, recent = health.first_losses, health.recent_losses
    if len(recent) > LOSS_STEPS == len(first):
        before, now = fmean(first), fmean(recent[-LOSS_STEPS:])
        if now > before + LOSS_RISE:
            text = f"the mean loss of the last {LOSS_STEPS} steps is {now:.3f}"
            yield "rising loss", f"{text}, that of the first {LOSS_STEPS} was {before:.3f}"
    if health.fresh and len(recent) >= FRESH_STEPS:
        now, guess = fmean(recent[-FRESH_STEPS:]), math.log(vocab_size)
        if now > guess + FRESH_MARGIN:
            text = f"the mean loss of the last {FRESH_STEPS} steps is {now:.3f}"
            yield "worse than guessing", f"{text}, guessing tokens at random gives {guess:.3f}"


def divergence_text(alarm: Alarm, planned: RunPlan) -> str:
    """What was seen, what usually causes it, what to try."""
    return (
        f"step {alarm.step}: the run looks as if it diverges: {alarm.seen}. Usual causes: a"
        " learning rate that is too high or reached too soon, broken data, or gradients that are"
        f" wrong on this device. Try {_remedies(planned)}"
    )


def _remedies(planned: RunPlan) -> str:
    train = planned.config.train
    ways = [f"a lower --lr than {train.lr:g}", f"a warm-up longer than {train.warmup_iters} steps"]
    if train.clip_grad == 0:
        ways.append("--clip-grad 1")
    if planned.plan.map.is_cyclic and (more_sweeps := with_more_sweeps(planned.recipe)):
        ways.append(more_sweeps)
    if planned.config.model.bf16:
        ways.append("some steps without --bf16, which must give nearly the same losses")
    return ", ".join(ways)


def fatal(
    train: TrainConfig, progress: Progress, result: StepResult, alarms: Sequence[Alarm] = ()
) -> TrainingError | None:
    """The error that ends the run after the step that ``progress`` counts last, if it must.

    ``alarms``: those that this step has raised.
    """
    if result.skipped:
        return _fatal_skip(train, progress, result)
    return _divergence(train, alarms)


def check_has_not_diverged(train: TrainConfig, health: Health) -> None:
    """A run that was stopped because it diverged does not go on by itself, when a launcher or a
    scheduler starts it again.

    Raises:
        DivergenceError: it has, and the policy is to stop.
    """
    error = _divergence(train, health.alarms)
    if error is not None:
        raise error


def _divergence(train: TrainConfig, alarms: Sequence[Alarm]) -> DivergenceError | None:
    if not alarms or train.divergence_policy == "warn":
        return None
    rule = "the run diverged, and --divergence-policy is stop"
    fix = (
        "change what the warning names and go back (older checkpoints were kept: write the number"
        " of one into the tracker file), or go on all the same by --divergence-policy warn"
    )
    faults = [Fault(f"step {alarm.step}", alarm.seen, rule, fix) for alarm in alarms]
    return DivergenceError(faults)


def _fatal_skip(train: TrainConfig, progress: Progress, result: StepResult) -> TrainingError | None:
    policy = {"nan": train.nan_policy, "spike": train.loss_spike_policy}[result.skipped]
    what = {"nan": "NaN or Inf", "spike": "the loss jumped"}[result.skipped]
    in_a_row = progress.health.skipped_in_a_row
    if policy == "stop":
        flag = "--nan-policy" if result.skipped == "nan" else "--loss-spike-policy"
        rule = f"{what}, and {flag} is stop; this step did not change the weights"
    elif in_a_row >= train.nan_max_consecutive_skips:
        rule = (
            f"{in_a_row} steps in a row were skipped, this one because of:"
            f" {what} (--nan-max-consecutive-skips)"
        )
    else:
        return None
    value = f"loss {result.loss}, gradient norm {result.grad_norm}"
    fix = (
        "lower --lr, warm up for longer, look at the data of this step, or train without --bf16;"
        " the checkpoint of this step holds the weights from before it"
    )
    return TrainingError(Fault(f"step {progress.step}", value, rule, fix))


def write_down(run: Run, result: StepResult) -> None:
    """Name the samples of the step just skipped: a warning, and a line in the ``--save`` folder.

    ``samples``: numbers in the order of training, first and last; ``sources``: for each of them the
    data it comes from and its number there.
    """
    if not run.state.is_first:
        return
    batch, progress = run.planned.batch.global_batch_size, run.progress
    first, last = progress.samples - batch, progress.samples - 1
    record = {
        "step": progress.step,
        "reason": result.skipped,
        "loss": result.loss if math.isfinite(result.loss) else str(result.loss),
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else str(result.grad_norm),
        "samples": [first, last],
        "sources": [run.data.source_of(sample) for sample in range(first, last + 1)],
    }
    warn(
        run.state,
        f"step {progress.step} was skipped ({result.skipped}: loss {result.loss:.4g},"
        f" gradient norm {result.grad_norm:.4g}): samples {first} to {last}",
    )
    if run.config.checkpoint.save is not None:
        path = Path(run.config.checkpoint.save) / SKIPPED_BATCHES
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            append_line(path, record, run.owner.holds)
        except OSError as error:
            warn(run.state, f"{path} cannot be written: {error.strerror}")
