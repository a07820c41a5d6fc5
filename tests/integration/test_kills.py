"""Killed at random, started again by the same command: the losses are those of a run nothing
happened to, bit by bit, and nothing is lost but the steps since the last save."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_kvshare.checkpoint import folder as folders
from tests.distributed.world import PATIENCE_SECONDS, World
from tests.integration.pretrain_jobs import MAPS, SMALL, losses
from tests.integration.ranks import Ranks, started
from tests.integration.test_pretrain import TWO, run

STEPS, INTERVAL = 400, 10
STEPPING = ["--train-iters", str(STEPS), "--eval-interval", str(STEPS)]
LENGTH = [*STEPPING, "--use-distributed-optimizer"]
SAVING = ["--save-interval", str(INTERVAL), "--resume", "auto"]
KILLS = 8
"""Of each map: 24 in all, and as many again of DeepSpeed's runs at two stages."""
CASES = {name: [*LENGTH, *flags] for name, flags in MAPS.items()}
CASES |= {
    f"cyclic, ZeRO {stage}": [*STEPPING, "--engine", "deepspeed", "--zero-stage", str(stage)]
    for stage in (1, 3)
}


def newest(save: Path) -> int:
    return (folders.candidates(save).iterations or [0])[0]


def wait_for_step(ranks: Ranks, step: int) -> None:
    line = f"step {step:>{len(str(STEPS))}}/{STEPS} ("
    assert ranks.wait_until(lambda: line in ranks.output(0)), ranks.output(0)


def wait_for_save(ranks: Ranks, save: Path, step: int) -> None:
    wait_for_step(ranks, step)  # an earlier start may have left half a save
    before = aside(save)
    ranks.wait_until(lambda: aside(save) - before or newest(save) >= step)


def aside(save: Path) -> set[Path]:
    """What is being written, or was when a start was killed."""
    return {*save.glob("*.partial")}


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_points(world: World, tmp_path: Path, name: str) -> None:
    flags = CASES[name]
    run(world, TWO, tmp_path / "whole.jsonl", *flags)
    draw, save, metrics = random.Random(name), tmp_path / "save", tmp_path / "m.jsonl"
    flags = [*flags, *SAVING, "--save", str(save), "--metrics-file", str(metrics)]
    during_a_save = 0
    for number in range(KILLS):
        before = newest(save)
        with started(tmp_path / f"start{number}", 2, flags) as ranks:
            if number % 2:
                wait_for_save(ranks, save, before + INTERVAL * draw.randint(1, 3))
                time.sleep(draw.random() * 0.05)
                during_a_save += bool(aside(save))
            else:
                wait_for_step(ranks, before + draw.randint(1, 3 * INTERVAL))
                time.sleep(draw.random() * 0.02)
            ranks.kill(*draw.choice([(0,), (1,), (0, 1)]))
            ranks.wait()
        assert newest(save) >= before
    with started(tmp_path / "last", 2, flags) as ranks:
        assert ranks.wait() == [0, 0], ranks.output(0)
    assert list(losses(metrics)) == list(range(1, STEPS + 1))
    assert losses(metrics) == losses(tmp_path / "whole.jsonl")
    assert during_a_save >= 1


@pytest.mark.nightly
def test_torchrun_starts_a_killed_worker_again(world: World, tmp_path: Path) -> None:
    run(world, TWO, tmp_path / "whole.jsonl", *LENGTH)
    metrics, save, output = tmp_path / "m.jsonl", tmp_path / "save", tmp_path / "log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node", "2", "--max-restarts", "1", "-m", "megatron_kvshare"]
    flags = [*SMALL, *LENGTH, *SAVING, "--save", str(save), "--metrics-file", str(metrics)]
    with output.open("w") as log:
        job = subprocess.Popen([*launcher, "pretrain", *flags], stdout=log, stderr=log)
    try:
        while newest(save) < 2 * INTERVAL:
            assert job.poll() is None, output.read_text()
            time.sleep(0.01)
        workers = [
            child for child in psutil.Process(job.pid).children() if "pretrain" in child.cmdline()
        ]
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGKILL)
        assert job.wait(PATIENCE_SECONDS) == 0, output.read_text()
    finally:
        job.kill()
    assert "Continuing from" in output.read_text()
    assert losses(metrics) == losses(tmp_path / "whole.jsonl")
