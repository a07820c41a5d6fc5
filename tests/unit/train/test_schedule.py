"""Learning rates: the corners of every decay style, and no jump within a run or between two."""

from __future__ import annotations

import itertools
import math
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megatron_kvshare.config import PretrainConfig, TrainConfig
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.config.rules.run import learning_rates_are_ordered, warmup_fits, wsd_fits
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.megatron_api.optimizer import (
    build_scheduler,
    learning_rate,
    set_learning_rate,
)
from megatron_kvshare.train.learning_rate import commands_to_train_on, schedule_change

PEAK, LOW = 0.5, 0.1


def rates(steps: list[int], **settings: Any) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    train = TrainConfig(lr=PEAK, min_lr=LOW, train_iters=100, **settings)
    scheduler = build_scheduler(optimizer, train)
    return [set_learning_rate(scheduler, step) for step in steps]


@pytest.mark.parametrize("warmup", [{"lr_warmup_iters": 10}, {"lr_warmup_fraction": 0.1}])
def test_warmup_is_linear_and_starts_above_zero(warmup: dict[str, float]) -> None:
    assert rates([1, 5, 10], **warmup) == pytest.approx([PEAK / 10, PEAK / 2, PEAK])


@pytest.mark.parametrize(
    ("style", "halfway"),
    [("cosine", (PEAK + LOW) / 2), ("linear", (PEAK + LOW) / 2), ("constant", PEAK)],
)
def test_decay(style: str, halfway: float) -> None:
    last = PEAK if style == "constant" else LOW
    got = rates([10, 55, 100], lr_decay_style=style, lr_warmup_iters=10)
    assert got == pytest.approx([PEAK, halfway, last])


def test_cosine_follows_its_formula() -> None:
    expected = LOW + (PEAK - LOW) * 0.5 * (1 + math.cos(math.pi * 0.3))
    assert rates([30], lr_decay_style="cosine") == pytest.approx([expected])


def test_wsd_is_stable_until_the_final_decay() -> None:
    got = rates(
        [10, 50, 80, 90, 100],
        lr_decay_style="WSD",
        lr_warmup_iters=10,
        lr_wsd_decay_iters=20,
        lr_wsd_decay_style="linear",
    )
    assert got == pytest.approx([PEAK, PEAK, PEAK, (PEAK + LOW) / 2, LOW])


def test_decay_can_end_before_the_run() -> None:
    assert rates([50, 75], lr_decay_iters=50) == pytest.approx([LOW, LOW])


def test_rate_depends_on_the_step_alone() -> None:
    assert rates([40, 3, 40])[0] == rates([40])[0] == rates([40, 3, 40])[2]


STYLES = ["cosine", "linear", "constant", "WSD"]
WSD_STYLES = ["exponential", "linear", "cosine", "minus_sqrt"]
COUNTS = st.none() | st.integers(1, 60)
SCHEDULES = st.builds(
    TrainConfig,
    lr=st.just(PEAK),
    min_lr=st.sampled_from([0.0, LOW, PEAK]),
    train_iters=st.integers(1, 60),
    lr_decay_style=st.sampled_from(STYLES),
    lr_wsd_decay_style=st.sampled_from(WSD_STYLES),
    lr_decay_iters=COUNTS,
    lr_wsd_decay_iters=COUNTS,
    lr_warmup_iters=st.just(0) | st.integers(0, 60),
    lr_warmup_fraction=st.none() | st.floats(0, 1, width=16),
)


def accepted(train: TrainConfig) -> bool:
    config = PretrainConfig(train=train)
    return not any(
        True
        for rule in (learning_rates_are_ordered, warmup_fits, wsd_fits)
        for _ in rule.check(config)
    )


def largest_change(train: TrainConfig) -> float:
    """Of two steps that follow each other, from the definitions of the shapes."""
    after, fall = train.decay_iters - train.warmup_iters, train.lr - train.min_lr
    steps, shape = after, train.lr_decay_style
    if shape == "WSD":
        steps, shape = train.lr_wsd_decay_iters or 0, train.lr_wsd_decay_style
    slopes = {
        "cosine": math.pi / 2 / steps,
        "linear": 1 / steps,
        "constant": 0.0,
        "exponential": 2 * math.log(2) / steps,
        "minus_sqrt": steps**-0.5,
    }
    rise = train.lr / train.warmup_iters if train.warmup_iters else 0.0
    return max(rise, fall * slopes[shape]) * (1 + 1e-9) + 1e-12


def steepest(values: list[float]) -> float:
    return max((abs(b - a) for a, b in itertools.pairwise(values)), default=0.0)


OVERLAPPING = TrainConfig(
    lr=PEAK, train_iters=40, lr_decay_style="WSD", lr_warmup_iters=30, lr_wsd_decay_iters=20
)


@settings(max_examples=300, deadline=None)
@given(train=SCHEDULES)
@example(train=OVERLAPPING)
def test_no_accepted_schedule_jumps(train: TrainConfig) -> None:
    assume(accepted(train))
    rate = [learning_rate(train, step) for step in range(1, 2 * train.train_iters + 2)]
    assert steepest(rate) <= largest_change(train)


def test_a_decay_that_begins_within_the_warm_up_is_refused() -> None:
    """It would fall from the peak to half of it after the last step of the warm-up."""
    (fault,) = wsd_fits.check(PretrainConfig(train=OVERLAPPING))
    assert fault.where == "--lr-wsd-decay-iters" and "at most 10" in fault.rule
    assert not list(
        wsd_fits.check(PretrainConfig(train=replace(OVERLAPPING, lr_wsd_decay_iters=10)))
    )


def words_of(train: TrainConfig) -> list[str]:
    values = {name: value for name, value in vars(train).items() if not name.startswith("_")}
    flags = {name: value for name, value in values.items() if "lr" in name or name == "train_iters"}
    pairs = [
        (f"--{name.replace('_', '-')}", str(value))
        for name, value in flags.items()
        if value is not None
    ]
    return [word for pair in pairs for word in pair]


BASE = "--mock-data --vocab-size 64 --num-layers 2 --hidden-size 16 --num-attention-heads 2"


@settings(max_examples=150, deadline=None)
@given(train=SCHEDULES)
@example(train=TrainConfig(lr=PEAK, train_iters=20))
def test_the_command_that_trains_on_does_not_jump(train: TrainConfig) -> None:
    assume(accepted(train))
    typed = ["pretrain", *BASE.split(), *words_of(train), "--save", "there", "--resume", "auto"]
    config = parse_pretrain(typed[1:])
    *_, last = commands_to_train_on(config, typed)
    words = shlex.split(last.removeprefix("  train on:"))
    try:
        longer = parse_pretrain(words[1:])
    except ConfigError as error:  # --load must exist, and here it does not
        assert [fault.where for fault in error.faults] == ["--load"]
        assert words[words.index("--load") + 1] == "there" and "--finetune" in words
        assert words[words.index("--save") + 1] == "there-longer"
        assert (
            train.warmup_iters
            or train.decay_iters < 3
            or "--lr-warmup" in last
            or (train.lr_wsd_decay_iters == train.decay_iters)
        )
        return
    before = [learning_rate(config.train, step) for step in range(1, train.train_iters + 1)]
    after = [
        learning_rate(longer.train, step)
        for step in range(train.train_iters + 1, longer.train.train_iters + 1)
    ]
    assert after and max(after) > 0
    assert steepest(before + after) <= largest_change(config.train)
    assert schedule_change(vars(config.train), longer.train, train.train_iters) is None


def test_a_resume_by_another_schedule_says_what_happens() -> None:
    stored = vars(TrainConfig(lr=1e-3, train_iters=40))
    told = schedule_change(stored, TrainConfig(lr=1e-3, train_iters=80), 40)
    assert told is not None
    for part in ("from 0 in step 40", "to 0.0004804 in step 41", "--train-iters was 40, now 80"):
        assert part in told
    assert "--finetune" in told  # the schedule has ended at 0: to keep it would train nothing
    halfway = schedule_change(stored, TrainConfig(lr=1e-3, train_iters=80), 20)
    assert halfway is not None and "give --lr-decay-iters 40." in halfway
    lower = schedule_change(stored, TrainConfig(lr=5e-4, min_lr=1e-5, train_iters=40), 20)
    assert lower is not None and "give --lr 0.001, --min-lr 0.0, --lr-decay-iters 40." in lower


def test_a_resume_by_the_same_schedule_says_nothing() -> None:
    train = TrainConfig(lr=1e-3, train_iters=40, lr_warmup_iters=4)
    for step in (1, 4, 20, 39):
        assert schedule_change(vars(train), train, step) is None
    longer = replace(train, train_iters=80, lr_decay_iters=40)
    assert schedule_change(vars(train), longer, 20) is None
    constant = replace(train, lr_decay_style="constant")
    assert schedule_change(vars(constant), replace(constant, train_iters=80), 40) is None
    assert schedule_change({}, train, 20) is None
