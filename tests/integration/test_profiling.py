"""--profile, --deterministic-mode: what they leave behind, and that the training is the same."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.world import World
from tests.integration.pretrain_jobs import SMALL, losses
from tests.integration.test_pretrain import ONE, TWO, run


def asked(start: int, end: int) -> list[object]:
    steps = ["--profile-step-start", start, "--profile-step-end", end]
    return ["--profile", "--use-pytorch-profiler", *steps]


def steps_of(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    names = {str(event.get("name")) for event in events}
    assert any("addmm" in name or "matmul" in name for name in names)
    return {name for name in names if name.startswith("step ")}


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    metrics = tmp_path_factory.mktemp("plain") / "m.jsonl"
    run(world, ONE, metrics)
    return losses(metrics)


def test_the_trace_holds_the_steps_that_were_asked_for(world, tmp_path, plain) -> None:
    flags = asked(2, 4)
    (outcome,) = run(world, ONE, tmp_path / "m.jsonl", *flags, "--save", tmp_path / "save")
    trace = tmp_path / "save" / "profile" / "steps-2-3-rank-0.json.gz"
    assert f"Profile of steps 2 to 3 on rank 0: {trace}" in outcome.output
    assert steps_of(trace) == {"step 2", "step 3"}
    assert losses(tmp_path / "m.jsonl") == plain


def test_a_rank_and_the_folder_of_tensorboard(world, tmp_path) -> None:
    flags = asked(5, 9)
    where = ["--profile-ranks", 1, "--tensorboard-dir", tmp_path / "events"]
    run(world, TWO, tmp_path / "m.jsonl", *flags, *where)
    (trace,) = (tmp_path / "events").glob("*.json.gz")
    assert trace.name == "steps-5-6-rank-1.json.gz"
    assert steps_of(trace) == {"step 5", "step 6"}  # the run ended with 6


def test_deterministic_mode_trains_the_same_on_a_cpu(tmp_path, plain) -> None:
    """In a process of its own: it holds until the end of one."""
    words = [*SMALL, "--metrics-file", str(tmp_path / "m.jsonl"), "--deterministic-mode"]
    code = (
        "import os, sys, torch\n"
        "from megatron_kvshare.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0 and torch.are_deterministic_algorithms_enabled()\n"
        "print(os.environ['CUBLAS_WORKSPACE_CONFIG'], os.environ['NCCL_ALGO'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "pretrain", *words], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == ":4096:8 Ring"
    assert losses(tmp_path / "m.jsonl") == plain


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--profile", "add --use-pytorch-profiler"),
        ("--profile --use-pytorch-profiler --profile-ranks 0 7", "0 to 0"),
    ],
)
def test_what_only_the_job_knows_is_refused(world, tmp_path, flags, says) -> None:
    start = ["--profile-step-start", 2, "--profile-step-end", 3]
    (outcome,) = run(world, ONE, tmp_path / "m.jsonl", *flags.split(), *start)
    assert outcome.error and says in outcome.error
    assert not (tmp_path / "m.jsonl").exists() or not losses(tmp_path / "m.jsonl")
