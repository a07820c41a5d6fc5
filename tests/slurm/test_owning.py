"""Who is a run and who owns its folder, as SLURM starts processes, loses nodes and starts again."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.integration.pretrain_jobs import SMALL
from tests.slurm.cluster import ENDED, Job, command, disturb, submit

TRAINER = [sys.executable, "-m", "megatron_kvshare", "pretrain", *SMALL]


def wrapped(folder: Path, line: str) -> tuple[Job, str]:
    """A job of two tasks on one node that has ended, and what it said."""
    options = ["--nodes=1", "--ntasks=2", "--time=10", "--output=logs/wrapped-%j.log"]
    done = subprocess.run(
        ["sbatch", "--parsable", *options, "--wrap", line],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    job = Job(done.stdout.split(";")[0].strip(), folder, folder)
    job.wait(lambda: job.field("JobState") in ENDED, 600, "the job to end")
    return job, (folder / "logs" / f"wrapped-{job.number}.log").read_text()


def test_processes_that_nobody_counted_are_told_how_to_count(clone: Path) -> None:
    save = clone / "uncounted" / "checkpoint"
    trainer = shlex.join([*TRAINER, "--save", str(save)])
    job, log = wrapped(clone, f"srun {trainer}")
    assert job.field("ExitCode") == "2:0", log
    assert log.count("environment variable SLURM_STEP_NUM_TASKS = '2'") == 1, log
    assert not save.parent.exists()
    found = re.search(r"bash -c '(RANK=.*?) exec kvshare \.\.\.'", log)
    assert found, log
    meet = "export MASTER_ADDR=$SLURMD_NODENAME MASTER_PORT=29612"
    job, log = wrapped(clone, f"{meet}; srun bash -c '{found[1]} exec {trainer}'")
    assert job.field("JobState") == "COMPLETED", log
    assert log.count("step 6/6") == 2 and "2 processes" in log, log  # training and validation


def test_batch_scripts_and_single_steps_are_no_launchers(clone: Path) -> None:
    save = clone / "single" / "checkpoint"
    trainer = shlex.join([*TRAINER, "--save", str(save), "--resume", "auto"])
    job, log = wrapped(clone, f"{trainer} --exit-interval 2; srun --ntasks=1 {trainer}")
    assert job.field("JobState") == "COMPLETED", log
    assert "Continuing from" in log and "step 6/6" in log


def test_two_jobs_do_not_share_a_folder(clone: Path) -> None:
    """On two nodes, where no process sees the other's."""
    save, options = clone / "shared" / "checkpoint", ("--nodes=1",)
    more = {"PREFLIGHT": "0"}
    first = submit(clone, save, more=more, options=options, flags="--train-iters 100000")
    try:
        first.wait_for_steps(1)
        busy = first.nodes[0]
        second = submit(clone, save, more=more, options=(*options, f"--exclude={busy}"))
        assert second.wait_for_end() == "FAILED", second.log()
    finally:
        command("scancel", first.number)
    assert (second.field("ExitCode"), second.restarts) == ("2:0", 0)
    said = [(second.logs / f"rank-000{rank}.log").read_text() for rank in (0, 1)]
    assert said[0].count("ownership error: --save = ") == 1 and "ownership" not in said[1]
    assert f" on {busy}, SLURM job {first.number} of " in said[0]
    assert first.wait_for_end() == "CANCELLED"


def test_a_requeued_job_takes_its_folder_over(test_cluster: None, clone: Path) -> None:
    """The first node loses its power: the owner cannot give the folder back, and nobody on the
    next node can see whether it lives."""
    save = clone / "owner-lost" / "checkpoint"
    options = ("--nodes=1", "--ntasks-per-node=2")
    flags = "--save-interval 10"
    job = submit(clone, save, more={"PREFLIGHT": "0"}, options=options, flags=flags)
    job.wait_for_steps(15)
    node = job.nodes[0]
    disturb("crash", node)
    try:
        job.wait(lambda: job.restarts >= 1, 300, "a requeue")
        assert list(save.glob("run.lock.*")), "the owner has given the folder back"
        assert job.wait_for_end() == "COMPLETED", job.log()
    finally:
        disturb("start", node)
    log = job.log()
    assert "Continuing from" in log and "waiting up to" not in log
    assert not list(save.glob("run.lock.*"))
