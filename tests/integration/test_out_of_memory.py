"""Ranks that run out of memory: all end within seconds, with one message and the same code."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_kvshare.errors import EXIT_USER_ERROR
from tests.distributed.world import PATIENCE_SECONDS
from tests.integration.conftest import ROOT
from tests.integration.pretrain_jobs import SMALL
from tests.integration.ranks import ENVIRONMENT, started

FLAGS = ["--eval-interval", "1", "--micro-batch-size", "1"]
PARTS = ("weights ", "gradients ", "optimizer ", "activations ", "logits ")
SAID = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.21 GiB is"
SECONDS = 15
"""Between the end of one rank and that of the others, at most."""


nightly = partial(pytest.param, marks=pytest.mark.nightly)


def program(ranks: str, place: str) -> list[str]:
    return ["-m", "tests.integration.short_of_memory", ranks, place]


def assert_one_message(output: str, where: str) -> None:
    assert output.count("out of memory: ") == 1, output
    assert f"out of memory: {where} = '{SAID}" in output
    message = output[output.index("out of memory: ") :]
    assert all(part in message for part in PARTS)
    assert "Traceback" not in output and "lost ranks" not in output


def test_alone(tmp_path: Path) -> None:
    command = [sys.executable, *program("0", "training"), "pretrain", *SMALL, *FLAGS]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == EXIT_USER_ERROR
    assert_one_message(done.stderr, "step 1, forward and backward, rank 0 on cpu")
    assert "--recompute-granularity full" in done.stderr
    assert "PYTORCH_CUDA_ALLOC_CONF" in done.stderr


@pytest.mark.parametrize(
    ("ranks", "place", "where"),
    [
        ("1", "training", "step 2, forward and backward, rank 1 on cpu"),
        nightly("0", "validation", "step 1, validation, rank 0 on cpu"),
        nightly("0,1", "building", "step 0, building the model, rank 0 on cpu"),
        nightly("1", "saving", "step 6, saving, rank 1 on cpu"),
    ],
)
def test_every_rank_ends_with_the_same_code(
    tmp_path: Path, ranks: str, place: str, where: str
) -> None:
    """As under srun, where the first rank has the store that the others look into."""
    flags = [*FLAGS, "--save", str(tmp_path / "save")]
    with started(tmp_path, 2, flags, program(ranks, place)) as job:
        assert job.wait_until(job.one_has_ended)
        assert job.wait(SECONDS) == [EXIT_USER_ERROR] * 2, job.output(0) + job.output(1)
        assert_one_message(job.output(0), where)
        assert "out of memory" not in job.output(1) and "Traceback" not in job.output(1)
    assert not list((tmp_path / "save").glob("iter_*[0-9]"))
    assert not list((tmp_path / "save").glob("run.lock.*")), "the folder is still owned"


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_reports_something_to_correct(tmp_path: Path, rank: int) -> None:
    launcher = [str(ROOT / "tools" / "torchrun.py"), "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, *program(str(rank), "training")]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "pretrain", *SMALL, *FLAGS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert_one_message(done.stderr, f"step 2, forward and backward, rank {rank} on cpu")
