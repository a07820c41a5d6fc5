"""Signals, the clock, spikes, other data: what ends a run or a step, and how it goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from megatron_kvshare.train.anomaly import SKIPPED_BATCHES
from tests.distributed.world import World
from tests.integration.pretrain_jobs import Accident, losses, records, set_latest
from tests.integration.saving_jobs import run_with_blocked_saves
from tests.integration.test_pretrain import ONE, TWO, run

AUTO = ("--resume", "auto")


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run on two ranks that nothing happens to."""
    path = tmp_path_factory.mktemp("whole") / "m.jsonl"
    run(world, TWO, path)
    return losses(path)


@pytest.mark.parametrize(
    ("number", "loaders"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGUSR1, 0)]
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    world: World, tmp_path: Path, whole: dict, number: signal.Signals, loaders: int
) -> None:
    """Two forwards a step: the signal comes in the second step, and the third is the last."""
    path = tmp_path / "m.jsonl"
    save = ("--save", tmp_path / "save", "--num-workers", loaders, *AUTO)
    outcomes = run(world, TWO, path, *save, accident=Accident(1, 4, number))
    assert [(each.step, each.stopped_by) for each in outcomes] == [(3, number.name)] * 2
    assert f"Stopped by {number.name} after step 3 of 6." in outcomes[0].output
    assert [path.name for path in (tmp_path / "save").glob("iter_*")] == ["iter_0000003"]
    outcomes = run(world, TWO, path, *save)
    assert [(each.step, each.stopped_by) for each in outcomes] == [(6, "")] * 2
    assert "Continuing from" in outcomes[0].output
    assert losses(path) == whole


def test_the_clock_and_the_interval_stop_a_run_too(
    world: World, tmp_path: Path, whole: dict
) -> None:
    path, save = tmp_path / "m.jsonl", ("--save", tmp_path / "save", *AUTO)
    (first, _) = run(world, TWO, path, *save, "--exit-duration-in-mins", 1e-9)
    assert (first.step, first.stopped_by) == (1, "--exit-duration-in-mins")
    (second, _) = run(world, TWO, path, *save, "--exit-interval", 4)
    assert (second.step, second.stopped_by) == (4, "--exit-interval")
    (third, _) = run(world, TWO, path, *save, "--exit-interval", 3)
    assert (third.step, third.stopped_by) == (6, "")
    assert losses(path) == whole


def test_steps_done_again_stand_once_in_the_metrics(
    world: World, tmp_path: Path, whole: dict
) -> None:
    """As after a crash: the run had gone on after its last checkpoint, and a line was cut off."""
    path, save = tmp_path / "m.jsonl", ("--save", tmp_path / "save", "--save-interval", 3, *AUTO)
    run(world, TWO, path, *save)
    set_latest(tmp_path / "save", 3)
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    run(world, TWO, path, *save)
    steps = [each["step"] for each in records(path) if "loss" in each]
    assert steps == [1, 2, 3, 4, 5, 6] and losses(path) == whole
    lines = path.with_name("m.jsonl.replaced").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == [4, 4, 5, 6, 6]
    assert lines[-1] == '{"step": 7, "lo'


FACTOR = ("--train-iters", 14, "--loss-spike-factor", 2)


@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "resumed before"])
def test_a_spike_is_skipped_and_its_samples_written_down(
    world: World, tmp_path: Path, resumed: bool
) -> None:
    """The losses it is measured by are in the checkpoint."""
    path, save = tmp_path / "m.jsonl", ("--save", tmp_path / "save", *AUTO)
    call = 23  # the 12th step's first forward
    if resumed:
        run(world, TWO, path, *save, *FACTOR, "--exit-interval", 11)
        call -= 22
    outcomes = run(world, TWO, path, *save, *FACTOR, accident=Accident(0, call, "spike"))
    assert [(each.step, each.skipped_steps) for each in outcomes] == [(14, 1)] * 2
    (line,) = records(tmp_path / "save" / SKIPPED_BATCHES)
    assert (line["step"], line["reason"], line["samples"]) == (12, "spike", [88, 95])
    assert line["sources"] == [["mock data", number] for number in range(88, 96)]
    skipped = [each["step"] for each in records(path) if each.get("skipped")]
    assert skipped == [12]


def test_a_spike_can_stop_the_run_and_what_was_learned_is_saved(
    world: World, tmp_path: Path
) -> None:
    save = ("--save", tmp_path / "save", *AUTO, *FACTOR)
    stop = ("--loss-spike-policy", "stop")
    path, accident = tmp_path / "m.jsonl", Accident(0, 12, "spike")
    (outcome,) = run(world, ONE, path, *save, *stop, "--micro-batch-size", 8, accident=accident)
    assert "step 12" in outcome.error and "the loss jumped" in outcome.error
    assert (tmp_path / "save" / "iter_0000012").is_dir()
    (outcome,) = run(world, ONE, path, *save, *stop, "--micro-batch-size", 8)
    assert (outcome.step, outcome.skipped_steps) == (14, 1)


def test_other_data_is_refused_on_resume_unless_it_is_meant(world: World, tmp_path: Path) -> None:
    path, save = tmp_path / "m.jsonl", ("--save", tmp_path / "save", *AUTO)
    run(world, ONE, path, *save, "--train-iters", 2)
    (outcome,) = run(world, ONE, path, *save, "--seed", 5, "--eod-mask-loss")
    assert "seed was 1234, now 5" in outcome.error
    assert "eod_mask_loss was False, now True" in outcome.error
    (outcome,) = run(world, ONE, path, *save, "--seed", 5, "--data-change-ok")
    assert outcome.step == 6


def test_another_run_is_not_written_over(world: World, tmp_path: Path) -> None:
    path, save = tmp_path / "m.jsonl", ("--save", tmp_path / "save")
    run(world, TWO, path, *save, "--train-iters", 2)
    first, second = run(world, TWO, path, *save)
    assert "write over" in first.error and "--resume auto" in first.error
    assert second.error == "exit 2"


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["at once", "beside"])
def test_one_save_that_fails_is_a_warning_and_the_next_one_counts(
    world: World, tmp_path: Path, whole: dict, flags: list
) -> None:
    path, save = tmp_path / "m.jsonl", tmp_path / "save"
    flags = ["--metrics-file", str(path), "--save", str(save), "--save-interval", "2", *flags]
    outcomes = world.run(run_with_blocked_saves, TWO, flags, (2,))
    assert [each.step for each in outcomes] == [6, 6] and losses(path) == whole
    assert sorted(each.name for each in save.glob("iter_*[0-9]")) == [
        "iter_0000004",
        "iter_0000006",
    ]


@pytest.mark.parametrize("steps", [(2, 4), (6,)], ids=["two in a row", "the last"])
def test_saves_that_go_on_failing_end_the_run(
    world: World, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    save = tmp_path / "save"
    flags = ["--save", str(save), "--save-interval", "2", "--async-save"]
    first, second = world.run(run_with_blocked_saves, TWO, flags, steps)
    assert "it cannot be written" in first.error and f"iter_{steps[-1]:07d}" in first.error
    assert second.error == "exit 2"
    assert len(list(save.glob("iter_*[0-9]"))) == (2 if steps == (6,) else 0)
