"""Saving beside the training changes neither the training nor what is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint.folder import latest_iteration
from megatron_kvshare.checkpoint.manifest import MANIFEST
from tests.distributed.world import PATIENCE_SECONDS, Layout, World
from tests.integration.pretrain_jobs import SMALL, losses, run_pretrain
from tests.integration.saving_jobs import run_on_a_small_disk, train_on_while_saving

TWO = Layout(data=2)
DISTRIBUTED = ["--use-distributed-optimizer"]

HOW = pytest.mark.parametrize(
    "beside",
    [
        pytest.param(True, id="async"),
        pytest.param(False, id="at once", marks=pytest.mark.nightly),
    ],
)


def files(root: Path) -> dict[str, bytes]:
    """Every file of every checkpoint but the manifests, which know how it was saved."""
    paths = [path for path in root.glob("iter_*/*") if path.name != MANIFEST]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        (TWO, [*DISTRIBUTED, "--overlap-grad-reduce", "--overlap-param-gather"]),
        pytest.param(Layout(pipeline=2), ["--bf16"], marks=pytest.mark.nightly),
        pytest.param(Layout(tensor=2, pipeline=2), ["--bf16"], marks=pytest.mark.nightly),
        pytest.param(Layout(pipeline=2, virtual=2), DISTRIBUTED, marks=pytest.mark.nightly),
        pytest.param(Layout(tensor=2, data=2), DISTRIBUTED, marks=pytest.mark.nightly),
    ],
    ids=lambda value: value if isinstance(value, Layout) else " ".join(value),
)
def test_equals_saving_at_once_to_the_byte(
    world: World, tmp_path: Path, layout: Layout, flags: list[str]
) -> None:
    """The state after step 2 is written when step 5 is over."""
    words = [*flags, "--save-interval", "2", "--save"]
    metrics = ["--metrics-file", str(tmp_path / "m.jsonl")]
    world.run(run_pretrain, layout, [*words, str(tmp_path / "once"), *metrics])
    expected = losses(tmp_path / "m.jsonl")
    arguments = ([*words, str(tmp_path / "beside"), "--async-save"], 3)
    records = world.run(train_on_while_saving, layout, *arguments)[0]
    assert {each["step"]: each["loss"] for each in records if "loss" in each} == expected
    once, beside = files(tmp_path / "once"), files(tmp_path / "beside")
    assert {Path(name).parent.name for name in once} == {f"iter_000000{n}" for n in (2, 4, 6)}
    assert once.keys() == beside.keys()
    assert [name for name in once if once[name] != beside[name]] == []
    assert latest_iteration(tmp_path / "beside") == 6


@pytest.mark.parametrize(
    ("beside", "full"),
    [
        pytest.param(False, 0, id="at once, rank 0"),
        pytest.param(True, 1, id="async, rank 1"),
        pytest.param(False, 1, id="at once, rank 1", marks=pytest.mark.nightly),
        pytest.param(True, 0, id="async, rank 0", marks=pytest.mark.nightly),
    ],
)
def test_a_full_disk(world: World, tmp_path: Path, beside: bool, full: int) -> None:
    """A warning, then one message; the older checkpoint stays, and nothing half written."""
    flags = ["--save", str(tmp_path), *DISTRIBUTED, *["--async-save"] * beside]
    world.run(run_pretrain, TWO, [*flags, "--exit-interval", "2"])
    before = files(tmp_path)
    flags += ["--resume", "auto", "--save-interval", "2"]
    outcomes = world.run(run_on_a_small_disk, TWO, flags, full, 100_000)
    assert outcomes[1].error == "exit 2"
    message = outcomes[0].error
    assert message.startswith("checkpoint error: --save = ") and "iter_0000006" in message
    assert "cannot be written" in message and "File too large" in message
    assert "Traceback" not in message and len(message.splitlines()) == 1
    assert files(tmp_path) == before and latest_iteration(tmp_path) == 2
    assert {path.name for path in tmp_path.glob("*iter*")} >= {"iter_0000002"}
    assert not list(tmp_path.glob("*.partial"))
    assert world.run(run_pretrain, TWO, flags)[0].step == 6


@HOW
def test_old_checkpoints_go(world: World, tmp_path: Path, beside: bool) -> None:
    """Never the newest, nor the one a run goes on from before it has written a newer one."""
    flags = ["--save", str(tmp_path), "--keep-last", "1", *["--async-save"] * beside]
    world.run(run_pretrain, TWO, [*flags, "--exit-interval", "2"])
    assert kept(tmp_path) == [2]
    flags += ["--resume", "auto", "--save-interval", "1", "--keep-every", "3"]
    world.run(run_on_a_small_disk, TWO, flags, 1, 10_000)
    assert kept(tmp_path) == [2]
    (outcome, _) = world.run(run_pretrain, TWO, flags)
    assert outcome.step == 6 and not outcome.error
    assert kept(tmp_path) == [3, 6]


def kept(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in root.glob("iter_*"))


@pytest.mark.nightly
@HOW
def test_killed_while_writing(world: World, tmp_path: Path, beside: bool) -> None:
    flags = ["--save", str(tmp_path), "--save-interval", "2", *["--async-save"] * beside]
    command = [sys.executable, "-m", "tests.integration.saving_jobs", "pretrain", *SMALL, *flags]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == -9
    (left,) = tmp_path.glob("*.partial")
    assert left.name.startswith("iter_0000004.")
    assert latest_iteration(tmp_path) == 2
    (outcome,) = world.run(run_pretrain, Layout(), [*flags, "--resume", "auto"])
    assert outcome.step == 6
    assert not list(tmp_path.glob("*.partial"))
