"""Real jobs on two nodes with two processes each: they finish, stop and go on, and lose nodes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.slurm.cluster import Job, command, disturb, processes, submit

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
    assert files == ["batch.log", *(f"rank-000{rank}.log" for rank in range(4))]
    batch = (finished.logs / "batch.log").read_text()
    assert "doctor: 4 ranks are ready to train" in batch and "seen from every node" in batch
    assert "finished after 0 requeues" in batch
    assert "tensor parallel 2" in (finished.logs / "rank-0000.log").read_text()


@pytest.mark.parametrize(
    ("launcher", "words", "preflight"),
    [("srun", ["--batch"], "0"), ("torchrun", [], "1")],
    ids=["srun, batch shell warned", "torchrun, only the step warned"],
)
def test_a_stopped_job_goes_on_bit_for_bit(
    finished: Job, clone: Path, launcher: str, words: list[str], preflight: str
) -> None:
    """SLURM warns the batch script before a time limit, and only the step when it preempts."""
    more = {"LAUNCHER": launcher, "PREFLIGHT": preflight, "MAX_REQUEUES": "0"}
    job = submit(clone, clone / f"stopped-{launcher}" / "checkpoint", more=more)
    job.wait_for_steps(10)
    command("scancel", *words, "--signal=USR1", job.number)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.restarts == 1
    assert job.steps() == [*STEPS], "a step is missing or was trained twice"
    assert job.losses() == finished.losses()
    log = job.log()
    assert "exit code 75: stopped after saving" in log and "finished after 1 requeues" in log
    assert "Continuing from" in log


def test_a_job_that_loses_a_node_finishes(test_cluster: None, finished: Job, clone: Path) -> None:
    more = {"PREFLIGHT": "0"}
    save = clone / "crashed" / "checkpoint"
    job = submit(clone, save, more=more, flags="--save-interval 10")
    job.wait_for_steps(15)
    node = job.nodes[1]
    disturb("crash", node)
    try:
        job.wait(lambda: job.restarts >= 1, 300, "a requeue")
    finally:
        disturb("start", node)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.losses() == finished.losses()


def test_a_job_that_hangs_is_ended_and_finishes(
    test_cluster: None, finished: Job, clone: Path
) -> None:
    """No process dies and no connection breaks: only the trainer can notice."""
    flags = "--save-interval 10 --distributed-timeout-minutes 0.5"
    job = submit(clone, clone / "hangs" / "checkpoint", more={"PREFLIGHT": "0"}, flags=flags)
    job.wait_for_steps(15)
    os.kill(processes(job)[-1], signal.SIGSTOP)
    job.wait(lambda: job.restarts >= 1, 300, "a requeue")
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.losses() == finished.losses()
    log = job.log()
    assert "nothing has moved for 30 s" in log and "requeue 1 of at most 10" in log


def test_lost_processes_are_replaced_up_to_a_limit(test_cluster: None, clone: Path) -> None:
    more = {"PREFLIGHT": "0", "MAX_REQUEUES": "1"}
    job = submit(clone, clone / "lost" / "checkpoint", more=more)
    for start in (0, 1):
        job.wait(lambda start=start: job.restarts == start and processes(job), 300, "a start")
        job.wait_for_steps(5 * (start + 1))
        os.kill(processes(job)[-1], signal.SIGKILL)
    assert job.wait_for_end() == "FAILED"
    assert job.restarts == 1
    assert "requeue 1 of at most 1" in job.log()
    assert "1 requeues for that were enough (MAX_REQUEUES=1)" in job.log()


def test_every_element_of_an_array_trains_its_map(clone: Path) -> None:
    """The last element bears the number of the whole array, and is still requeued alone."""
    maps = ("pizza-bottom", "pizza-top", "lasagna-bottom")
    more = {"PREFLIGHT": "0", "MAPS": " ".join(maps)}
    options = ("--nodes=1", "--array=0-2")
    array = submit(clone, clone / "series", more=more, options=options)
    jobs = [
        Job(f"{array.number}_{index}", clone, clone / "series" / name / "checkpoint")
        for index, name in enumerate(maps)
    ]
    jobs[2].wait_for_steps(5)
    command("scancel", "--batch", "--signal=USR1", jobs[2].number)
    for job in jobs:
        assert job.wait_for_end() == "COMPLETED", job.log()
        assert job.steps() == [*STEPS]
        assert (job.save / "latest_checkpointed_iteration.txt").read_text().strip() == "120"
    assert [job.restarts for job in jobs] == [0, 0, 1]
    assert len({job.losses()[120] for job in jobs}) == 3


def test_nodes_with_different_code_are_refused(clone: Path) -> None:
    """The second node starts from a copy of the repository in which a file has changed."""
    other = clone / "copy"
    for name in ("examples", "tools", "megatron_kvshare", "runs"):
        shutil.copytree(clone / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = other / "megatron_kvshare" / "train" / "loop.py"
    changed.write_text(changed.read_text() + "# changed\n")
    (clone / "two.sh").write_text(
        'if [[ "$SLURM_NODEID" -eq 1 ]]; then cd copy; fi\n'
        'exec bash examples/pretrain_110m.sh "$@"\n'
    )
    job = submit(clone, clone / "differs" / "checkpoint", "two.sh")
    assert job.wait_for_end() == "FAILED", job.log()
    assert (job.field("ExitCode"), job.restarts) == ("2:0", 0)
    log = job.log()
    assert log.count("all nodes need the same code; it differs in train/loop.py.") == 1
    first, second = job.nodes
    assert f"on {first}" in log and f"{other}/megatron_kvshare on {second}" in log
    assert not list(job.logs.glob("rank-*")), "training was started"


def test_a_user_error_is_not_requeued(clone: Path) -> None:
    more = {"PREFLIGHT": "0"}
    job = submit(clone, clone / "wrong" / "checkpoint", more=more, flags="--lr nonsense")
    assert job.wait_for_end() == "FAILED"
    assert (job.field("ExitCode"), job.restarts) == ("2:0", 0)
    batch = (job.logs / "batch.log").read_text()
    assert "--lr = 'nonsense'" in batch and "the job is not requeued" in batch


def test_a_cancelled_job_saves_and_stays_cancelled(clone: Path) -> None:
    """It ends with 75, too: SLURM would bring it back to life if it were asked to."""
    job = submit(clone, clone / "cancelled" / "checkpoint", more={"PREFLIGHT": "0"})
    job.wait_for_steps(5)
    command("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    job.wait(lambda: "the job was cancelled" in job.log(), 60, "the batch script's last words")
    assert (job.field("JobState"), job.restarts) == ("CANCELLED", 0)
    assert (job.save / "latest_checkpointed_iteration.txt").is_file()
