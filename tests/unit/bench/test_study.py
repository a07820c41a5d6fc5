"""How the time is shared out, and which batches are tried."""

from __future__ import annotations

import pytest

from megatron_kvshare.bench.study import Clock, try_halves


@pytest.mark.parametrize(
    ("speeds", "tried"),
    [
        ({16: 5.0, 8: 4.0, 4: 9.0}, [16, 8]),
        ({16: 5.0, 8: 6.0, 4: 7.0, 2: 1.0}, [16, 8, 4, 2]),
        ({1: 3.0}, [1]),
        ({3: 1.0, 1: 2.0}, [3, 1]),
    ],
)
def test_halves_are_tried_while_they_are_faster(speeds: dict[int, float], tried: list[int]) -> None:
    seen: list[int] = []

    def speed(batch: int) -> float:
        seen.append(batch)
        return speeds[batch]

    try_halves(max(speeds), speed, Clock(1000))
    assert seen == tried


def test_without_time_the_largest_batch_is_all() -> None:
    seen: list[int] = []
    try_halves(16, lambda batch: seen.append(batch) or 1.0 / batch, Clock(0))
    assert seen == [16]


def test_shares_of_a_clock() -> None:
    clock = Clock(100)
    assert clock.share(4).left == pytest.approx(25, abs=1)
    assert not clock.expired() and Clock(-5).share(3).expired()
