"""From the --kv-* flags to the recipe and the sweeps of training and of evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kvshare.config import PretrainConfig, SharingConfig
from megatron_kvshare.config.derive import recipe
from megatron_kvshare.config.flags.command_line import RENAMED
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import OLD_NAMES, RECIPES
from megatron_kvshare.spec.run_plan import RunPlan

BASE = "--mock-data --vocab-size 100 --kv-pattern sandwich-top --kv-layers 3"


def parsed(argv: str) -> PretrainConfig:
    return parse_pretrain(f"{BASE} {argv}".split(), {})


def plan_of(argv: str) -> RunPlan:
    return RunPlan.of(parsed(argv), 1)


@pytest.mark.parametrize(
    ("argv", "notation"),
    [
        ("", "strided(4; 1, 1)p"),
        ("--kv-recipe paper", "jacobi(7, 2)"),
        ("--kv-recipe two-sweep", "strided(4; 1, 1)p"),
        ("--kv-recipe one-sweep", "strided(4; 0, 1) from input"),
        ("--kv-recipe two-sweep --kv-stride 8", "strided(8; 1, 1)p"),
        ("--kv-recipe two-sweep --kv-solver jacobi", "jacobi(1, 1)p"),
        ("--kv-recipe two-sweep --kv-backward-sweeps 2", "strided(4; 1, 2)p"),
        (
            "--kv-recipe two-sweep --kv-forward-sweeps 0 --kv-start self",
            "strided(4; 0, 1)p from self",
        ),
        ("--kv-recipe one-sweep --kv-start zero", "strided(4; 0, 1)"),
        ("--kv-forward-sweeps 1", "jacobi(1, 2)"),
        ("--kv-forward-sweeps 0 --kv-backward-sweeps 3", "jacobi(0, 3)"),
        ("--kv-backward-sweeps 1", "jacobi(7, 1)"),
        ("--kv-solver jacobi", "jacobi(7, 2)"),
        ("--kv-solver strided --kv-forward-sweeps 1", "strided(4; 1, 2)"),
        ("--kv-stride 8", "strided(8; 1, 1)p"),
        ("--kv-solver strided --kv-start self", "strided(4; 1, 1)p from self"),
        ("--kv-recipe one-sweep --kv-stride 8", "strided(8; 0, 1) from input"),
        (
            "--kv-recipe one-sweep --kv-start self --kv-project-at-use",
            "strided(4; 0, 1)p from self",
        ),
    ],
)
def test_recipe_of_the_flags(argv: str, notation: str) -> None:
    assert str(recipe(parsed(argv).sharing)) == notation


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_recipe_is_a_choice(name: str) -> None:
    assert recipe(parsed(f"--kv-recipe {name}").sharing) == RECIPES[name]


@pytest.mark.parametrize(("earlier", "name"), OLD_NAMES.items())
def test_earlier_names_are_taken_everywhere(earlier: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"kv-recipe: {earlier}\n")
    assert parsed(f"--kv-recipe {earlier}").sharing.kv_recipe == name
    assert parsed(f"--config {file}").sharing.kv_recipe == name
    assert SharingConfig(kv_recipe=earlier).kv_recipe == name


@pytest.mark.parametrize(("earlier", "name"), RENAMED.items())
def test_earlier_flags_and_keys_are_taken(earlier: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{earlier}: 3\n")
    flag = "--" + earlier.replace("_", "-")
    assert getattr(parsed(f"{flag} 3").sharing, name) == 3
    assert getattr(parsed(f"--config {file}").sharing, name) == 3
    assert getattr(parsed(f"--config {file} {flag} 4").sharing, name) == 4
    with pytest.raises(ConfigError, match=f"{flag} = 'x'"):
        parsed(f"{flag} x")


def limits(plan: ExecutionPlan) -> list[float | None]:
    (group,) = plan.groups
    return [sweep.skip_below for sweep in group.sweeps]


@pytest.mark.parametrize("in_training", [False, True])
def test_tolerance_is_for_evaluation_unless_training_asks_for_it(in_training: bool) -> None:
    flag = " --kv-tolerance-in-training" * in_training
    planned = plan_of(
        f"--kv-recipe two-sweep --kv-tolerance 0.01 --kv-min-sweeps 2 --kv-max-sweeps 4{flag}"
    )
    found = [None, None, 0.01, 0.01, None]
    assert limits(planned.evaluation_plan) == found
    assert limits(planned.plan) == (found if in_training else [None, None])


def test_without_tolerance_evaluation_has_the_sweeps_of_training() -> None:
    planned = plan_of("--kv-recipe two-sweep")
    assert planned.evaluation_plan == planned.plan
    assert planned.plan.groups[0].sweeps[0].stride == 4
