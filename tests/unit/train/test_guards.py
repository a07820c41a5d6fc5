"""NaN, Inf and spikes of the loss: skipped, counted, written down, or the end of the run."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_kvshare.checkpoint.manifest import Progress
from megatron_kvshare.config import TrainConfig
from megatron_kvshare.train.guards import SPIKE_WINDOW, counted, fatal, loss_limit, vote
from megatron_kvshare.train.run import StepResult

ALONE = SimpleNamespace(world_size=1, rank=0)


def after(train: TrainConfig, progress: Progress, loss: float, bad: str = "") -> Progress:
    return replace(progress, step=progress.step + 1, **counted(train, progress, loss, bad))


def result(bad: str) -> StepResult:
    return StepResult(math.nan, 1.0, 1.0, (), bad, 0)


def test_finite_values_pass() -> None:
    assert vote((1.0, 2.0), 0, ALONE) == (True, 0)
    assert vote((1.0, math.nan), 15, ALONE) == (False, 15)
    assert vote((math.inf, 1.0), 0, ALONE) == (False, 0)


def test_skip_tolerates_single_steps_and_stops_after_too_many_in_a_row() -> None:
    train = TrainConfig(nan_max_consecutive_skips=2)
    progress = after(train, after(train, Progress(), math.nan, "nan"), 3.0)
    progress = after(train, progress, math.nan, "nan")
    assert progress.skipped_steps == 2 and fatal(train, progress, result("nan")) is None
    error = fatal(train, after(train, progress, 99.0, "spike"), result("spike"))
    assert "step 4" in str(error) and "2 steps in a row were skipped" in str(error)


@pytest.mark.parametrize(("bad", "flag"), [("nan", "--nan-policy"), ("spike", "--loss-spike-poli")])
def test_stop_ends_the_run_at_once(bad: str, flag: str) -> None:
    train = TrainConfig(nan_policy="stop", loss_spike_policy="stop")
    assert f"{flag}" in str(fatal(train, Progress(7), result(bad)))
    assert fatal(train, Progress(7), result("")) is None


def test_a_spike_is_measured_by_the_losses_before_it() -> None:
    train = TrainConfig(loss_spike_factor=2.0)
    progress = Progress()
    for number in range(9):
        progress = after(train, progress, 1.0 + number)
        assert loss_limit(train, progress) == math.inf
    progress = after(train, progress, 10.0)
    assert loss_limit(train, progress) == 2 * 5.5
    assert after(train, progress, 99.0, "spike").recent_losses == progress.recent_losses
    for _ in range(SPIKE_WINDOW):
        progress = after(train, progress, 3.0)
    assert loss_limit(train, progress) == 6.0 and len(progress.recent_losses) == SPIKE_WINDOW


def test_losses_are_kept_only_where_spikes_are_looked_for() -> None:
    assert after(TrainConfig(), Progress(), 1.0).recent_losses == ()
