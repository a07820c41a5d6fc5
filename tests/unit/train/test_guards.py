"""NaN and Inf: skipped and counted, or the end of the run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_kvshare.config import TrainConfig
from megatron_kvshare.errors import TrainingError
from megatron_kvshare.train.guards import NanGuard, all_finite

ALONE = SimpleNamespace(world_size=1, rank=0)


def test_finite_values_pass() -> None:
    assert all_finite((1.0, 2.0), ALONE)
    assert not all_finite((1.0, math.nan), ALONE)
    assert not all_finite((math.inf, 1.0), ALONE)


def test_skip_tolerates_single_steps_and_stops_after_too_many_in_a_row() -> None:
    guard = NanGuard(TrainConfig(nan_max_consecutive_skips=2), ALONE)
    guard.after_step(1, math.nan, 1.0, skipped=True)
    guard.after_step(2, 3.0, 1.0, skipped=False)
    guard.after_step(3, math.nan, 1.0, skipped=True)
    with pytest.raises(TrainingError, match=r"step 4.*2 steps in a row"):
        guard.after_step(4, math.nan, 1.0, skipped=True)


def test_stop_ends_the_run_at_once() -> None:
    guard = NanGuard(TrainConfig(nan_policy="stop"), ALONE)
    with pytest.raises(TrainingError, match="--nan-policy is stop"):
        guard.after_step(7, math.inf, 1.0, skipped=True)
