"""A run that diverges says so, on every layout and after a resume; a healthy one does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.world import Layout, World
from tests.integration.pretrain_jobs import records
from tests.integration.test_pretrain import TWO, run

WILD = ("--lr", 5, "--clip-grad", 0, "--train-iters", 14)
"""The first updates throw the weights far away: the loss of the next steps is that of a model that
is wrong with certainty."""
SIGN = "worse than guessing"
TOLD = "the run looks as if it diverges: the mean loss of the last 5 steps"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(tensor=2), id="tp"),
        pytest.param(Layout(data=2), id="dp", marks=pytest.mark.nightly),
        pytest.param(Layout(pipeline=2), id="pp", marks=pytest.mark.nightly),
    ],
)
def test_it_is_told_once_and_in_the_closing_words(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    path = tmp_path / "m.jsonl"
    first, second = run(world, layout, path, *WILD, "--log-interval", 100)
    assert first.step == second.step == 14
    assert first.warnings.count(TOLD) == 1 and TOLD not in second.warnings
    assert "Usual causes" in first.warnings and "--clip-grad 1" in first.warnings
    assert "Done" not in first.output
    assert "Ended after 14 steps" in first.output and f"  {SIGN} in step" in first.output
    assert [each["step"] for each in records(path) if each.get("diverging")]


def test_it_can_stop_the_run_and_older_checkpoints_stay(world: World, tmp_path: Path) -> None:
    """Started again, as a launcher or a scheduler would, it does not go on by itself; when it is
    told to it does, and does not warn of the same again."""
    save = tmp_path / "save"
    flags = (*WILD, "--save", save, "--save-interval", 1, "--keep-last", 2, "--resume", "auto")
    stop = ("--divergence-policy", "stop")
    first, second = run(world, TWO, tmp_path / "m.jsonl", *flags, *stop)
    assert first.error.startswith("training diverged: step ") and SIGN not in first.error
    assert "--divergence-policy is stop" in first.error and second.error == "exit 3"
    kept = sorted(each.name for each in save.glob("iter_*"))
    assert len(kept) == 3  # the two before, and that of the step that raised the alarm
    again, second = run(world, TWO, tmp_path / "m.jsonl", *flags, *stop)
    assert (again.error, second.error) == (first.error, "exit 3")
    assert sorted(each.name for each in save.glob("iter_*")) == kept
    first, _ = run(world, TWO, tmp_path / "m.jsonl", *flags)
    assert first.step == 14 and TOLD not in first.warnings
    assert f"  {SIGN} in step" in first.output and "Done" not in first.output


def test_a_run_from_loaded_weights_is_not_compared_with_guessing(
    world: World, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    run(world, TWO, tmp_path / "m.jsonl", *WILD, "--train-iters", 2, "--save", save)
    for more in (["--finetune"], []):
        first, _ = run(world, TWO, tmp_path / "n.jsonl", *WILD, "--load", save, *more)
        assert first.step == 14 and TOLD not in first.warnings


def test_a_healthy_run_says_nothing(world: World, tmp_path: Path) -> None:
    first, _ = run(world, TWO, tmp_path / "m.jsonl", "--train-iters", 45, "--log-interval", 100)
    assert "diverge" not in first.warnings and "Done: 45 steps" in first.output
