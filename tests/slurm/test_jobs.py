"""Real jobs on two nodes with two processes each: they finish, stop and go on, and lose nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Job, command, disturb, submit

STEPS = range(1, 121)


@pytest.fixture(scope="module")
def finished(clone: Path) -> Job:
    """A job that nobody disturbed."""
    job = submit(clone, clone / "whole" / "checkpoint")
    state = job.wait_for_end()
    assert state == "COMPLETED", job.log()
    return job


def test_two_nodes_train(finished: Job) -> None:
    assert list(finished.losses()) == [*STEPS]
    assert finished.losses()[120] < finished.losses()[1] - 0.1
    files = sorted(path.name for path in finished.logs.iterdir())
    assert files == ["batch.log", *(f"rank-000{rank}.log" for rank in range(4)), "stops"]
    batch = (finished.logs / "batch.log").read_text()
    assert "doctor: 4 ranks are ready to train" in batch and "seen from every node" in batch
    assert "finished after 0 requeues" in batch
    assert "tensor parallel 2" in (finished.logs / "rank-0000.log").read_text()
