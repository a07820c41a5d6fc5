"""Loggers that fail, on a disk that is full: they cost a warning, never a step or a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint.folder import latest_iteration
from megatron_kvshare.checkpoint.load import newest_sound
from megatron_kvshare.config import CheckpointConfig, LogConfig
from megatron_kvshare.train.sinks import Expendable, JsonLines, TensorBoard, Wandb
from tests.disks import small_disk
from tests.distributed.world import PATIENCE_SECONDS, Layout, World
from tests.integration.pretrain_jobs import SMALL, records, run_pretrain

PAGE = 4096
RECORD = {"step": 1, "loss": 2.5, "grad_norm": 1.0}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, 4 * PAGE):
        yield folder


def fill(disk: Path, free_pages: int) -> Path:
    blocker = disk / "blocker"
    blocker.write_bytes(b"0" * (4 - free_pages) * PAGE)
    return blocker


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "async"])
def test_a_run_whose_loggers_fail_trains_and_saves(
    world: World, disk: Path, tmp_path: Path, single, beside: bool
) -> None:
    fill(disk, 3)
    save = tmp_path / "save"
    flags = ["--metrics-file", disk / "m.jsonl", "--tensorboard-dir", disk / "events"]
    flags += ["--save", save, "--save-interval", 3, "--train-iters", 20, *["--async-save"] * beside]
    (ended,) = world.run(run_pretrain, Layout(), [str(each) for each in flags])
    assert (ended.step, ended.error) == (20, "")
    assert newest_sound(CheckpointConfig(load=str(save)), single) == (20, ())
    warned = ended.warnings.splitlines()
    for name in ("m.jsonl cannot be written: No space left", "--tensorboard-dir fails and is left"):
        assert sum(name in line for line in warned) == 1, warned
    lines = (disk / "m.jsonl").read_text()
    assert lines.endswith("\n") and len(records(disk / "m.jsonl")) > 3  # whole lines only


def test_nowhere_to_print_to(tmp_path: Path) -> None:
    """Standard output and error on a full disk, as of a batch system's log."""
    command = [sys.executable, "-m", "megatron_kvshare", "pretrain", *SMALL, "--train-iters", "2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--save", str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=full,
            stderr=full,
            timeout=PATIENCE_SECONDS,
        )
    assert (done.returncode, latest_iteration(tmp_path)) == (0, 2)


def test_lost_output_of_another_command_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_kvshare", "--version"],
            env={name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
    assert done.returncode == 2
    assert "standard output" in done.stderr and "No space left" in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_metrics_go_on_when_the_disk_has_room_again(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocker = fill(disk, 1)
    sink = JsonLines(disk / "m.jsonl", 0)
    for step in range(1, 201):
        sink.write(RECORD | {"step": step})
    there = len(records(disk / "m.jsonl"))
    assert 0 < there < 200
    blocker.unlink()
    sink.write(RECORD | {"step": 201})
    steps = [each["step"] for each in records(disk / "m.jsonl")]
    assert steps == [*range(1, there + 1), 201]
    sink.close()
    first, second = capsys.readouterr().err.splitlines()
    assert "m.jsonl cannot be written: No space left" in first
    assert f"m.jsonl lacks {200 - there} records" in second


def test_a_resume_on_a_full_disk_leaves_the_metrics_alone(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = disk / "m.jsonl"
    before = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 41))
    path.write_text(before)
    fill(disk, 1)
    sink = Expendable("--metrics-file", lambda: JsonLines(path, 39))
    sink.write(RECORD)
    assert path.read_text() == before and not list(disk.glob("*.partial"))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "--metrics-file fails and is left out" in warning and "No space left" in warning


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("free_pages", [0, 1], ids=["at the start", "later"])
def test_tensorboard(disk: Path, capfd: pytest.CaptureFixture[str], free_pages: int) -> None:
    fill(disk, free_pages)
    sink = Expendable("--tensorboard-dir", lambda: TensorBoard(str(disk / "events"), 0))
    check_left_out_once(sink, "--tensorboard-dir", capfd)


def test_wandb_at_the_start(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    fill(disk, 0)
    log = LogConfig(wandb_project="p", wandb_mode="offline", wandb_save_dir=str(disk))
    check_left_out_once(
        Expendable("--wandb-project", lambda: Wandb(log, {}, {})), "--wandb-project", capfd
    )


def check_left_out_once(sink: Expendable, flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 400):
        sink.write(RECORD | {"step": step})
    sink.close()
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert f"{flag} fails and is left out" in warning and "No space left" in warning
