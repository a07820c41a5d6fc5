"""slurm/pretrain.sbatch with stand-ins for srun and scontrol; real jobs are in tests/slurm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import Workspace

# Shows its options, runs the command behind them as the third process, ends as it is told.
FAKE_SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "srun option $1"; shift; done
SLURM_PROCID=2 SLURM_LOCALID=0 SLURM_NODEID=1 "$@" || exit
exit "${ENDS_WITH:-0}"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames"*) printf 'first-node\\nsecond-node\\n' ;;
  "-o show job"*) echo "JobId=123 JobState=${STATE:-RUNNING Reason=None} Restarts=0" ;;
  requeue*) echo "requeued ${*:2}" ;;
esac
"""
SHOW = 'echo "$LAUNCHER $NNODES $MASTER_ADDR $MASTER_PORT ${MAP:-} ${SAVE:-}, ${CHECK:-run}: $*"\n'
JOB = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "nodes[1-2]",
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NAME": "name",
    "SLURM_CPUS_PER_TASK": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "DATA_PATH": "tokens",
}
ELEMENT = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "1"}

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(workspace: Workspace, tmp_path: Path) -> Start:
    """Runs the batch script in a job, with the stand-ins first on the PATH."""
    for name, code in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(code)
        (tmp_path / name).chmod(0o755)
    (workspace.folder / "show.sh").write_text(SHOW)
    path = f"{tmp_path}:{os.environ['PATH']}"
    fixed = {**JOB, "SLURM_SUBMIT_DIR": str(workspace.folder), "PATH": path}

    def run(words: str = "show.sh", **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**fixed, "LOG_DIR": str(tmp_path / "logs"), **more}
        return workspace.bash(f"bash slurm/pretrain.sbatch {words}", environment)

    return run


def test_every_process_starts_the_example(start: Start):
    done = start("show.sh --lr '1e-3'")
    assert done.returncode == 0, done.stderr
    check, run = [line for line in done.stdout.splitlines() if "first-node" in line]
    assert check.startswith("srun 2 first-node 10123") and check.endswith(", 1: ")
    assert run.endswith(", run: --lr 1e-3")
    assert "srun option --cpus-per-task=4" in done.stdout
    assert "/logs/rank-%4t.log" in done.stdout
    assert "start 1: 2 nodes (nodes[1-2]) x 2 processes" in done.stderr


def test_torchrun_is_started_once_per_node(start: Start):
    done = start(LAUNCHER="torchrun", PREFLIGHT="0")
    assert done.stdout.count("torchrun 2 first-node") == 1
    for option in ("--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8"):
        assert f"srun option {option}\n" in done.stdout


def test_deepspeeds_launcher_is_started_once_per_node(start: Start, tmp_path: Path):
    done = start(LAUNCHER="deepspeed", PREFLIGHT="0")
    assert done.stdout.count("deepspeed 2 first-node") == 1
    for option in ("--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8"):
        assert f"srun option {option}\n" in done.stdout
    hosts = (tmp_path / "logs/hostfile").read_text()
    assert hosts == "first-node slots=2\nsecond-node slots=2\n"


def test_a_missing_example_is_told(start: Start):
    done = start("examples/nothing.sh")
    assert done.returncode == 2
    assert "submit from the root of the repository" in done.stderr


@pytest.mark.parametrize(
    ("code", "more", "requeued"),
    [
        (0, {}, False),
        (2, {}, False),
        (3, {}, False),
        (75, {}, True),
        (75, {"MAX_REQUEUES": "0", "SLURM_RESTART_COUNT": "50"}, True),
        (69, {}, True),
        (137, {"SLURM_RESTART_COUNT": "9"}, True),
        (137, {"SLURM_RESTART_COUNT": "10"}, False),
        (1, {"MAX_REQUEUES": "0"}, False),
        # A cancelled job must not come back; one that has reached its time limit must.
        (75, {"STATE": "COMPLETING Reason=None"}, False),
        (75, {"STATE": "COMPLETING Reason=TimeLimit"}, True),
        (75, {"STATE": "CANCELLED Reason=None"}, False),
    ],
)
@pytest.mark.parametrize("preflight", ["1", "0"])
def test_the_exit_code_decides(
    start: Start, code: int, more: dict[str, str], requeued: bool, preflight: str
):
    done = start(ENDS_WITH=str(code), PREFLIGHT=preflight, **more)
    assert done.returncode == code
    assert done.stdout.count("requeued 123\n") == requeued
    assert done.stdout.count("first-node") == (2 if preflight == "1" and code == 0 else 1)
    assert done.stderr.count("slurm: exit code") == (code != 0)


def test_planned_stops_do_not_count_as_lost(start: Start, tmp_path: Path):
    start(ENDS_WITH="75", PREFLIGHT="0")
    assert (tmp_path / "logs" / "stops").read_text().count("requeue 1: stopped") == 1
    lost = {"ENDS_WITH": "69", "PREFLIGHT": "0", "MAX_REQUEUES": "1"}
    assert "requeued" in start(SLURM_RESTART_COUNT="1", **lost).stdout
    assert "requeued" not in start(SLURM_RESTART_COUNT="2", **lost).stdout


def test_an_element_of_an_array_has_its_map_and_folder_and_is_requeued_alone(start: Start):
    more = {**ELEMENT, "MAPS": "cla:2 mlkv:4", "SAVE": "series", "PREFLIGHT": "0"}
    done = start(ENDS_WITH="75", **more)
    assert "mlkv:4 series/mlkv-4/checkpoint, run" in done.stdout
    assert "requeued 120_1\n" in done.stdout
    done = start(**{**more, "SLURM_ARRAY_TASK_ID": "2"})
    assert done.returncode == 2 and "the 2 maps are cla:2 mlkv:4" in done.stderr
