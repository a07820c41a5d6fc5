"""Ranks that die or hang: the job ends in time, says who it was and where, and can go on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_kvshare.errors import EXIT_LOST
from tests.integration.ranks import lines_of, started

LONG = ["--train-iters", "100000", "--eval-interval", "100000"]
LONGEST_SECONDS = 120
"""Far below what a rank waits for another without the flag."""


@pytest.mark.nightly
def test_a_killed_rank_is_named_by_the_others(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    with started(tmp_path, 2, [*LONG, "--metrics-file", str(metrics)]) as ranks:
        assert ranks.wait_until(lambda: lines_of(metrics) >= 3)
        ranks.kill(1)
        assert ranks.wait() == [EXIT_LOST, -signal.SIGKILL]
        output = ranks.output(0)
    process = ranks.processes[1].pid
    assert "lost ranks: step " in output and f"rank 1 (process {process} on " in output
    assert "Traceback" not in output


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_job_in_time(tmp_path: Path, victim: int) -> None:
    metrics = tmp_path / "m.jsonl"
    flags = [*LONG, "--metrics-file", str(metrics), "--distributed-timeout-minutes", "0.1"]
    with started(tmp_path, 2, flags) as ranks:
        assert ranks.wait_until(lambda: lines_of(metrics) >= 3)
        ranks.kill(victim, number=signal.SIGSTOP)
        other = 1 - victim
        assert ranks.processes[other].wait(LONGEST_SECONDS) == EXIT_LOST
        output = ranks.output(other)
    assert "nothing has moved for 6 s" in output and "gives no sign of life" in output
    assert f"rank {victim}" in output and f"[rank {other}] is here:" in output
    assert "forward_backward" in output or "train_step" in output
    assert bool(list(tmp_path.glob("m.jsonl.lock.*"))) == (victim == 0), "who lives gives back"
