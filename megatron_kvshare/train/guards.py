"""What happens when a loss or gradient is not a number (L5): the same decision on every rank."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_kvshare.config import TrainConfig
from megatron_kvshare.errors import Fault, TrainingError
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.train.together import together


def all_finite(values: tuple[float, ...], state: ParallelState) -> bool:
    """True if ``values`` are finite on every rank."""
    finite = all(map(math.isfinite, values))
    if state.world_size == 1:
        return finite
    broken = torch.tensor(int(not finite), device=state.platform.device)
    dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    return not broken.item()


class NanGuard:
    """Counts steps skipped in a row and stops the run where ``--nan-policy`` says so."""

    def __init__(self, train: TrainConfig, state: ParallelState) -> None:
        self._policy = train.nan_policy
        self._most_in_a_row = train.nan_max_consecutive_skips
        self._state = state
        self.in_a_row = 0

    def after_step(self, step: int, loss: float, grad_norm: float, skipped: bool) -> None:
        """Take note of one step; ``skipped`` is the same on all ranks.

        Raises:
            TrainingError: policy ``stop``, or too many skipped steps in a row.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return
        if self._policy == "stop":
            rule = "NaN or Inf, and --nan-policy is stop; this step did not change the weights"
        elif self.in_a_row >= self._most_in_a_row:
            rule = f"{self.in_a_row} steps in a row had NaN or Inf (--nan-max-consecutive-skips)"
        else:
            return
        value = f"loss {loss}, gradient norm {grad_norm}"
        fix = (
            "lower --lr, warm up for longer, look at the data of this step, or train without --bf16"
        )
        with together(self._state):
            raise TrainingError(Fault(f"step {step}", value, rule, fix))
