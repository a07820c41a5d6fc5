"""Learning rates at the corners of every decay style, as a function of the step alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_kvshare.config import TrainConfig
from megatron_kvshare.megatron_api.optimizer import build_scheduler, set_learning_rate

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
