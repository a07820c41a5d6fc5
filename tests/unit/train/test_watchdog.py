"""Who is lost, from two looks at the signs of life of all ranks."""

from __future__ import annotations

from megatron_kvshare.train.watchdog import Sign, report, silent


def sign(count: int, step: int = 5, what: str = "forward and backward") -> Sign:
    return Sign(count, step, what, "node", 7)


def test_a_rank_whose_count_stands_still_is_lost() -> None:
    before, after = [sign(1), sign(4), sign(2), None], [sign(2), sign(4), sign(3), None]
    assert silent(before, after) == [1, 3]
    assert report(before, after) == [
        "rank 1 (process 7 on node) gives no sign of life, it was last seen in step 5, forward and"
        " backward",
        "rank 3 gives no sign of life",
        "ranks 0, 2 in step 5, forward and backward",
    ]


def test_a_rank_that_comes_late_is_not_lost() -> None:
    assert silent([None, sign(1)], [sign(1), sign(2)]) == []


def test_those_that_are_behind_come_first_and_ranks_in_a_row_are_short() -> None:
    before = [sign(1) for _ in range(12)]
    after = [sign(2) for _ in range(11)] + [sign(2, 4, "saving")]
    assert report(before, after) == [
        "rank 11 in step 4, saving",
        "ranks 0-10 in step 5, forward and backward",
    ]
