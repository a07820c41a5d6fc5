"""Which checkpoint a run without --kv-recipe takes its recipe from, and that rules see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint import folder
from megatron_kvshare.checkpoint.manifest import MANIFEST, Manifest, Progress
from megatron_kvshare.checkpoint.recipe import with_recipe_of_checkpoint
from megatron_kvshare.config import ModelConfig
from megatron_kvshare.config.derive import recipe
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES, Recipe
from megatron_kvshare.spec.model_spec import ModelSpec
from tests.distributed.world import PATIENCE_SECONDS
from tests.recipes import jacobi, strided

BASE = "--mock-data --vocab-size 100 --num-layers 3 --kv-map 0_2_2"


def save(root: Path, step: int, recipe: Recipe, kv_map: str = "0_2_2") -> Path:
    target = folder.iteration_folder(root, step)
    aside = folder.begin(target)
    model, sharing = ModelConfig(num_layers=3), build_map(3, kv_map=kv_map)
    spec = ModelSpec(model=model, map=sharing, recipe=recipe, vocab_size=100)
    Manifest(spec.identity, Progress(step), 1, 1, True).write(aside)
    folder.publish(aside, target, step)
    return target


def taken(flags: str, said: list[str] | None = None) -> str:
    """The recipe of a run with these flags."""
    say = [].append if said is None else said.append
    config = parse_pretrain(
        f"{BASE} {flags}".split(), {}, lambda config: with_recipe_of_checkpoint(config, say)
    )
    return str(recipe(config.sharing))


@pytest.mark.parametrize(
    "stored",
    [
        *RECIPES.values(),
        jacobi(1, 2),
        jacobi(0, 2, "self", p=True),
        strided(8, 2, 1, "input", True),
    ],
    ids=str,
)
def test_every_recipe_is_taken_whole(tmp_path: Path, stored: Recipe) -> None:
    save(tmp_path, 3, stored)
    assert taken(f"--load {tmp_path}") == str(stored)


def test_flags_of_parts_change_it_and_other_names_do_not_meet_it(tmp_path: Path) -> None:
    save(tmp_path, 3, RECIPES["one-sweep"])
    assert taken(f"--load {tmp_path} --kv-stride 8") == "strided(8; 0, 1) from input"
    for flags in ("--kv-recipe two-sweep", "--kv-solver jacobi", "--kv-backward-sweeps 1"):
        said: list[str] = []
        assert taken(f"--load {tmp_path} {flags}", said) == taken(flags)
        assert not said


def test_resume_comes_before_load(tmp_path: Path) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    save(start, 3, RECIPES["paper"])
    flags = f"--load {start} --finetune --save {run}"
    assert taken(f"{flags} --resume auto") == str(RECIPES["paper"])
    save(run, 1, RECIPES["one-sweep"])
    assert taken(f"{flags} --resume auto") == str(RECIPES["one-sweep"])
    assert taken(flags) == str(RECIPES["paper"])


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 3, RECIPES["one-sweep"])
    newest = save(tmp_path, 6, RECIPES["paper"]) / MANIFEST
    newest.write_text(newest.read_text().replace('"jacobi"', '"strided"'))
    assert taken(f"--load {tmp_path}") == str(RECIPES["one-sweep"])


@pytest.mark.parametrize("tracker", [b"\xff\xfe", b"", b"9"])
def test_a_damaged_tracker_does_not_hide_it(tmp_path: Path, tracker: bytes) -> None:
    save(tmp_path, 3, RECIPES["one-sweep"])
    (tmp_path / folder.TRACKER).write_bytes(tracker)
    assert taken(f"--load {tmp_path}") == str(RECIPES["one-sweep"])


def test_without_a_recipe_to_take_the_default_stays(tmp_path: Path) -> None:
    assert taken(f"--load {tmp_path}") == taken("")
    save(tmp_path, 3, RECIPES["one-sweep"], kv_map="0_1_1")
    said: list[str] = []
    assert taken(f"--load {tmp_path}", said) == taken("")
    save(tmp_path, 6, RECIPES["one-sweep"])
    assert taken(f"--load {tmp_path} --kv-map 0_1_1", said) == taken("")
    assert not said


def test_rules_see_it(tmp_path: Path) -> None:
    """Three subsets do not divide among two tensor-parallel ranks, the default's four do."""
    save(tmp_path, 3, strided(3, 1, 1))
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --dry-run"
    assert taken(flags) == str(RECIPES["two-sweep"])
    with pytest.raises(ConfigError, match=r"--kv-stride 3"):
        taken(f"{flags} --load {tmp_path}")


def test_finding_it_needs_no_torch() -> None:
    """Faults of a configuration are told before torch is loaded, the checkpoint's recipe known."""
    code = "import sys, megatron_kvshare.checkpoint.recipe; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout == "False\n", done.stderr
