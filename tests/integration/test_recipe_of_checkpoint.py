"""A run without --kv-recipe goes on with the recipe of its checkpoint, whatever the default is now.

The checkpoints were made when the default was one sweep.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint.manifest import read_manifest
from megatron_kvshare.cli.main import main
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.solver import RECIPES
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.setup import prepare
from tests.distributed.world import PATIENCE_SECONDS, Layout, World
from tests.integration.conftest import ROOT
from tests.integration.pretrain_jobs import SMALL, Outcome, config_of, losses, run_pretrain

SMALLEST = shlex.split(
    "--vocab-size 9 --num-layers 2 --hidden-size 8 --ffn-hidden-size 8 --num-attention-heads 2"
    " --num-query-groups 1 --seq-length 16 --kv-pattern pizza-top --kv-layers 1 --eval-iters 0"
    " --save-interval 3"
)
"""The model in them."""
PARTS = {"default": [], "start-self": ["--kv-start", "self"]}
RECIPE = {
    "default": "one-sweep: strided(4; 0, 1) from input",
    "start-self": "strided(4; 0, 1) from self",
}
NOTE = "--kv-recipe is not given: going on with the checkpoint's, "


def expected(root: Path, kind: str) -> dict[int, float]:
    """The losses of the same run, not interrupted, by the version that made the checkpoint."""
    return {step: loss for step, loss in losses(root / f"{kind}.jsonl").items() if step > 3}


@pytest.fixture
def copy(format_6: Path, tmp_path: Path) -> Path:
    shutil.copytree(format_6, tmp_path, dirs_exist_ok=True)
    return tmp_path


def trained(world: World, *flags: object) -> Outcome:
    (outcome,) = world.run(run_pretrain, Layout(), [*SMALLEST, *map(str, flags)])
    return outcome


@pytest.mark.parametrize("kind", PARTS)
def test_resume_auto(world: World, copy: Path, kind: str) -> None:
    metrics = copy / "new.jsonl"
    where = ["--save", copy / kind, "--resume", "auto", "--metrics-file", metrics]
    outcome = trained(world, *PARTS[kind], *where)
    assert not outcome.error and f"{NOTE}{RECIPE[kind]}\n" in outcome.output
    assert f"recipe {RECIPE[kind]}" in outcome.output
    assert losses(metrics) == pytest.approx(expected(copy, kind), rel=1e-6)


def test_a_part_in_a_file(world: World, copy: Path) -> None:
    settings, metrics = copy / "run.yaml", copy / "new.jsonl"
    settings.write_text("kv-start: self\n")
    where = ["--load", copy / "start-self", "--save", copy / "new", "--metrics-file", metrics]
    outcome = trained(world, "--config", settings, *where)
    assert not outcome.error and f"{NOTE}{RECIPE['start-self']}\n" in outcome.output
    assert losses(metrics) == pytest.approx(expected(copy, "start-self"), rel=1e-6)


def test_load_elsewhere_and_resume_there(world: World, copy: Path) -> None:
    metrics = copy / "new.jsonl"
    where = ["--load", copy / "default", "--save", copy / "elsewhere", "--resume", "auto"]
    first = trained(world, *where, "--exit-interval", 4, "--metrics-file", metrics)
    second = trained(world, *where, "--metrics-file", metrics)
    for outcome in (first, second):
        assert not outcome.error and f"{NOTE}{RECIPE['default']}\n" in outcome.output
    assert (first.step, second.step) == (4, 6)
    assert losses(metrics) == pytest.approx(expected(copy, "default"), rel=1e-6)


def recipe_in(folder: Path) -> object:
    return read_manifest(folder / "iter_0000003").identity["kv_recipe"]


def test_finetune_keeps_it_or_takes_another(world: World, copy: Path) -> None:
    start = ["--load", copy / "default", "--finetune", "--train-iters", 3]
    outcome = trained(world, *start, "--save", copy / "kept")
    assert outcome.step == 3 and f"{NOTE}{RECIPE['default']}\n" in outcome.output
    assert recipe_in(copy / "kept") == RECIPES["one-sweep"].as_dict()
    outcome = trained(world, *start, "--save", copy / "part", "--kv-stride", 2)
    assert f"{NOTE}{RECIPE['default']}, changed to strided(2; 0, 1) from input\n" in outcome.output
    outcome = trained(world, *start, "--save", copy / "other", "--kv-recipe", "two-sweep")
    assert outcome.step == 3 and NOTE not in outcome.output
    assert recipe_in(copy / "other") == RECIPES["two-sweep"].as_dict()


@pytest.mark.parametrize("flags", ["--kv-recipe two-sweep", "--kv-solver jacobi", "--kv-stride 2"])
def test_another_recipe_is_refused_on_resume(world: World, copy: Path, flags: str) -> None:
    outcome = trained(world, *flags.split(), "--save", copy / "default", "--resume", "auto")
    assert "the checkpoint has 'one-sweep: strided(4; 0, 1) from input'" in outcome.error
    assert "leave out --kv-recipe and the flags of its parts" in outcome.error


def test_dry_run_says_it_too(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", *SMALL, *SMALLEST, "--save", str(copy / "default"), "--dry-run"]
    assert main([*words, "--resume", "auto"]) == 0
    report = capsys.readouterr()
    assert report.err.count(f"note: {NOTE}{RECIPE['default']}\n") == 1
    assert f"recipe {RECIPE['default']}" in report.out
    assert main(words) == 0  # a fresh run, as far as a dry run knows
    report = capsys.readouterr()
    assert NOTE not in report.err and "recipe two-sweep: strided(4; 1, 1)p" in report.out


def test_the_command_itself(copy: Path) -> None:
    words = [sys.executable, "-m", "megatron_kvshare", "pretrain", *SMALL, *SMALLEST]
    words += ["--save", str(copy / "default"), "--resume", "auto"]
    done = subprocess.run(
        [*words, "--metrics-file", str(copy / "new.jsonl")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert f"note: {NOTE}{RECIPE['default']}\n" in done.stderr
    assert losses(copy / "new.jsonl") == pytest.approx(expected(copy, "default"), rel=1e-6)


def with_recipe_of_its_rank(state: ParallelState, layout: Layout) -> str:
    flags = ["--kv-recipe", ["one-sweep", "two-sweep"][state.rank]]
    try:
        prepare(RunPlan.of(config_of(layout, flags), state.world_size), state)
    except Exception as error:
        return str(error)
    except SystemExit as leave:
        return f"exit {leave.code}"
    return ""


def test_ranks_that_see_different_checkpoints_do_not_start(world: World) -> None:
    first, second = world.run(with_recipe_of_its_rank, Layout(data=2))
    assert "do not see the same checkpoints" in first and second == "exit 2"
