"""NaN, Inf, spikes of the loss and divergence: skipped, told, counted, or the end of the run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from megatron_kvshare.checkpoint.manifest import Alarm, Health, Progress
from megatron_kvshare.config import ModelConfig, PretrainConfig, SharingConfig, TrainConfig
from megatron_kvshare.errors import EXIT_DIVERGED, DivergenceError
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.agreement import vote
from megatron_kvshare.train.anomaly import (
    WINDOW,
    after_step,
    check_has_not_diverged,
    divergence_text,
    fatal,
    loss_limit,
)
from megatron_kvshare.train.run import StepResult

ALONE = SimpleNamespace(world_size=1, rank=0)
VOCABULARY = 100  # log: 4.605


def result(loss: float = 4.0, norm: float = 1.0, bad: str = "") -> StepResult:
    return StepResult(loss, 1.0, norm, (), bad, 0)


def after(health: Health, *results: StepResult, clip_grad: float = 1.0) -> Health:
    """Steps are numbered from 1."""
    for step, each in enumerate(results, 1):
        health = after_step(health, each, step, clip_grad, VOCABULARY)
    return health


def causes(health: Health) -> list[str]:
    return [alarm.cause for alarm in health.alarms]


def test_finite_values_pass() -> None:
    assert vote((1.0, 2.0), 0, ALONE) == (True, 0)
    assert vote((1.0, math.nan), 15, ALONE) == (False, 15)
    assert vote((math.inf, 1.0), 0, ALONE) == (False, 0)


def test_skip_tolerates_single_steps_and_stops_after_too_many_in_a_row() -> None:
    train = TrainConfig(nan_max_consecutive_skips=2)
    health = after(Health(), result(bad="nan"), result(3.0), result(bad="nan"))
    assert fatal(train, Progress(3, health=health), result(bad="nan")) is None
    health = after(health, result(99.0, bad="spike"))
    error = fatal(train, Progress(4, health=health), result(bad="spike"))
    assert "step 4" in str(error) and "2 steps in a row were skipped" in str(error)


@pytest.mark.parametrize(("bad", "flag"), [("nan", "--nan-policy"), ("spike", "--loss-spike-poli")])
def test_stop_ends_the_run_at_once(bad: str, flag: str) -> None:
    train = TrainConfig(nan_policy="stop", loss_spike_policy="stop")
    assert f"{flag}" in str(fatal(train, Progress(7), result(bad=bad)))
    assert fatal(train, Progress(7), result()) is None


def test_a_spike_is_measured_by_the_losses_before_it() -> None:
    train = TrainConfig(loss_spike_factor=2.0)
    health = Health()
    for number in range(9):
        health = after(health, result(1.0 + number))
        assert loss_limit(train, health) == math.inf
    health = after(health, result(10.0))
    assert loss_limit(train, health) == 2 * 5.5
    assert loss_limit(TrainConfig(), health) == math.inf
    assert after(health, result(99.0, bad="spike")).recent_losses == health.recent_losses
    health = after(health, *[result(3.0)] * WINDOW)
    assert loss_limit(train, health) == 6.0
    assert len(health.recent_losses) == len(health.recent_norms) == WINDOW


@pytest.mark.parametrize(
    ("norm", "clip_grad", "alarm"),
    [(9999.0, 1.0, False), (10001.0, 1.0, True), (10001.0, 0.0, True), (10001.0, 2.0, False)],
)
def test_a_huge_norm_is_told_from_the_first_step_on(norm, clip_grad, alarm) -> None:
    health = after(Health(), result(norm=norm), clip_grad=clip_grad)
    assert causes(health) == ["huge gradient norm"] * alarm


def test_a_norm_far_above_the_median() -> None:
    """Of at least 20 steps; the outliers among them do not move it."""
    usual = [result(norm=0.5)] * 15 + [result(norm=40.0)] * 4
    assert causes(after(Health(), *usual, result(norm=60.0))) == []
    usual.append(result(norm=0.5))
    assert causes(after(Health(), *usual, result(norm=49.9))) == []
    health = after(Health(), *usual, result(norm=50.1))
    assert causes(health) == ["jump of the gradient norm"]
    assert health.alarms[0].step == 21 and "median 0.5 of 20 steps" in health.alarms[0].seen
    nothing = [result(norm=0.0)] * 30
    assert causes(after(Health(), *nothing, result(norm=1.0))) == []


def test_a_mean_loss_above_that_of_the_first_steps() -> None:
    first = [result(4.0)] * 20
    assert causes(after(Health(), *first, *[result(4.5)] * 30)) == []
    health = after(Health(), *first, *[result(4.6)] * 20)
    assert causes(health) == ["rising loss"]
    assert "that of the first 20 was 4.000" in health.alarms[0].seen
    # One bad step of twenty is a spike, not a rise.
    assert causes(after(Health(), *first, *[result(4.0)] * 20, result(13.0))) == []


def test_new_weights_that_do_worse_than_guessing() -> None:
    near, far = result(math.log(VOCABULARY) + 0.99), result(math.log(VOCABULARY) + 1.01)
    assert causes(after(Health(fresh=True), *[near] * 19)) == []
    assert causes(after(Health(fresh=True), *[far] * 4)) == []
    assert causes(after(Health(fresh=True), *[far] * 5)) == ["worse than guessing"]
    assert causes(after(Health(), *[far] * 19)) == []


def test_each_cause_is_told_once_and_skipped_steps_do_not_count() -> None:
    health = after(Health(), *[result(norm=1e5)] * 3)
    assert causes(health) == ["huge gradient norm"] and health.alarms[0].step == 1
    assert after(Health(), result(math.nan, math.inf, "nan")) == Health(skipped_in_a_row=1)
    assert causes(after(Health(), result(9.0, 1e9, "spike"))) == []


def test_it_survives_json_and_older_formats() -> None:
    health = after(Health(fresh=True), *[result(9.0, 2e4)] * 6)
    assert len(health.alarms) == 2
    assert Health.from_dict(json.loads(json.dumps(asdict(health)))) == health
    old = {"skipped_in_a_row": 2, "recent_losses": [3.0, 4.0]}
    assert Health.from_dict(old) == Health(skipped_in_a_row=2, recent_losses=(3.0, 4.0))


ALARM = Alarm("huge gradient norm", 7, "the gradient norm before clipping is 1e+09")


def test_the_policy_decides_whether_divergence_ends_the_run() -> None:
    progress = Progress(7, health=Health(alarms=(ALARM,)))
    assert fatal(TrainConfig(), progress, result(), [ALARM]) is None
    stop = TrainConfig(divergence_policy="stop")
    error = fatal(stop, progress, result(), [ALARM])
    assert error is not None and error.exit_code == EXIT_DIVERGED == 3
    assert "1e+09" in str(error) and "--divergence-policy is stop" in str(error)
    assert fatal(stop, progress, result()) is None  # nothing new in this step
    with pytest.raises(DivergenceError, match="--divergence-policy warn"):
        check_has_not_diverged(stop, progress.health)
    check_has_not_diverged(TrainConfig(), progress.health)
    check_has_not_diverged(stop, Health())


def test_the_warning_says_what_was_seen_what_causes_it_and_what_to_try() -> None:
    config = PretrainConfig(train=TrainConfig(lr=5.0, clip_grad=0.0, lr_warmup_iters=10))
    text = divergence_text(ALARM, RunPlan.of(config, 1))
    assert "step 7" in text and ALARM.seen in text and "Usual causes" in text
    assert "a lower --lr than 5" in text and "longer than 10 steps" in text
    assert "--clip-grad 1" in text and "--kv-recipe" not in text and "--bf16" not in text
    cyclic = SharingConfig(kv_pattern="lasagna-top", kv_layers=3)
    config = PretrainConfig(model=ModelConfig(bf16=True), sharing=cyclic)
    text = divergence_text(ALARM, RunPlan.of(config, 1))
    assert "--clip-grad" not in text and "without --bf16" in text
    assert "--kv-recipe paper" in text  # the default is two-sweep already
