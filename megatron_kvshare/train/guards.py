"""Steps that must not change the weights (L5): NaN, Inf and sudden jumps of the loss.

The same decision on every rank: loss and gradient norm are sums over all ranks already, and what a
single rank sees is voted on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_kvshare.checkpoint.manifest import Progress
from megatron_kvshare.config import TrainConfig
from megatron_kvshare.errors import Fault, TrainingError
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.train.run import Bad, Run, StepResult
from megatron_kvshare.train.sinks import append_line
from megatron_kvshare.train.together import warn

SPIKE_WINDOW = 100
"""A loss is compared with the mean of this many before it."""
_ENOUGH = 10
"""Losses without which a mean says nothing."""
SKIPPED_BATCHES = "skipped_batches.jsonl"
"""File in the ``--save`` folder that names the samples of every step that was skipped."""


class Votes(NamedTuple):
    """``finite``: on every rank; ``stop``: the largest wish of any rank, 0 to go on."""

    finite: bool
    stop: int


def vote(values: tuple[float, ...], stop: int, state: ParallelState) -> Votes:
    """Whether ``values`` are finite and whether to stop after this step, by one collective."""
    finite = all(map(math.isfinite, values))
    if state.world_size == 1:
        return Votes(finite, stop)
    ballot = torch.tensor([int(not finite), stop], device=state.platform.device)
    dist.all_reduce(ballot, op=dist.ReduceOp.MAX)
    broken, wish = ballot.tolist()
    return Votes(not broken, wish)


def loss_limit(train: TrainConfig, progress: Progress) -> float:
    """The loss above which the next step is a spike."""
    recent = progress.recent_losses
    if train.loss_spike_factor is None or len(recent) < _ENOUGH:
        return math.inf
    return train.loss_spike_factor * sum(recent) / len(recent)


def counted(train: TrainConfig, progress: Progress, loss: float, bad: Bad) -> dict[str, Any]:
    """The fields of ``progress`` that a step with this outcome moves."""
    if bad:
        in_a_row = progress.skipped_in_a_row + 1
        return {"skipped_steps": progress.skipped_steps + 1, "skipped_in_a_row": in_a_row}
    recent = (*progress.recent_losses, loss)[-SPIKE_WINDOW:]
    return {
        "skipped_in_a_row": 0,
        "recent_losses": () if train.loss_spike_factor is None else recent,
    }


def fatal(train: TrainConfig, progress: Progress, result: StepResult) -> TrainingError | None:
    """The error that ends the run after the step that ``progress`` counts last, if it must."""
    policy = {"nan": train.nan_policy, "spike": train.loss_spike_policy}.get(result.skipped)
    what = {"nan": "NaN or Inf", "spike": "the loss jumped"}.get(result.skipped)
    if policy == "stop":
        flag = "--nan-policy" if result.skipped == "nan" else "--loss-spike-policy"
        rule = f"{what}, and {flag} is stop; this step did not change the weights"
    elif policy == "skip" and progress.skipped_in_a_row >= train.nan_max_consecutive_skips:
        rule = (
            f"{progress.skipped_in_a_row} steps in a row were skipped, this one because of:"
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
    batch, progress = run.layout.global_batch_size, run.progress
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
        folder = Path(run.config.checkpoint.save)
        folder.mkdir(parents=True, exist_ok=True)
        append_line(folder / SKIPPED_BATCHES, record)
