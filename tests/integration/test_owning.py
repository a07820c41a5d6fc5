"""Of two runs that write to one place, one is refused and the other's results are whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint.folder import candidates, iteration_folder, latest_iteration
from megatron_kvshare.checkpoint.integrity import problems
from megatron_kvshare.checkpoint.manifest import read_manifest
from megatron_kvshare.ownership.owner import file_place, take
from tests.distributed.world import PATIENCE_SECONDS, Layout, World
from tests.integration.owning_jobs import (
    BEAT,
    run_usurped_between_saves,
    run_usurped_while_saving,
)
from tests.integration.pretrain_jobs import SMALL, run_pretrain
from tests.integration.ranks import started
from tests.integration.test_pretrain import ONE, TWO, run

ROUNDS = 5


def locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.lock*"))


def test_a_second_run_is_refused_on_all_ranks(world: World, tmp_path: Path) -> None:
    save = tmp_path / "save"
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.owning_jobs", str(save)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "owned\n"
        path = tmp_path / "m.jsonl"
        first, second = run(world, TWO, path, "--save", save, "--resume", "auto")
        assert first.error.startswith("ownership error: --save = ")
        assert f"process {owner.pid} on " in first.error and second.error == "exit 2"
        assert not path.exists() and locks(tmp_path) == ["run.lock.1"]
    finally:
        owner.kill()
    # Killed, and nobody has asked for its exit code: it is taken over at once.
    outcomes = run(world, TWO, path, "--save", save, "--resume", "auto")
    assert [each.step for each in outcomes] == [6, 6]
    assert locks(tmp_path) == []
    owner.wait()


def test_two_runs_do_not_share_a_metrics_file(world: World, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    owner = take(file_place("--metrics-file", str(path)), BEAT)
    (outcome,) = run(world, ONE, path, "--save", tmp_path / "save")
    assert "--metrics-file = " in outcome.error and f"process {os.getpid()} " in outcome.error
    owner.check()
    owner.release()
    assert list(tmp_path.iterdir()) == [], "the refused run has left something"


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["at once", "beside"])
def test_a_run_that_was_replaced_publishes_nothing(
    world: World, tmp_path: Path, flags: list[str]
) -> None:
    words = ["--save", str(tmp_path), "--save-interval", "2", "--keep-last", "1", *flags]
    first, second = world.run(run_usurped_while_saving, TWO, words, str(tmp_path), 4)
    assert first.error.startswith("ownership error: --save = ")
    assert "process 77 on elsewhere" in first.error and "has taken over" in first.error
    assert second.error == "exit 2"
    assert latest_iteration(tmp_path) == 2
    names = sorted(path.name for path in tmp_path.iterdir() if "kvshare" not in path.name)
    assert names == ["iter_0000002", "latest_checkpointed_iteration.txt", "run.lock.2"]


def test_a_run_that_was_replaced_ends_before_its_next_save(world: World, tmp_path: Path) -> None:
    save, metrics = tmp_path / "save", tmp_path / "m.jsonl"
    words = ["--save", str(save), "--metrics-file", str(metrics), "--train-iters", "100000"]
    outcomes = world.run(run_usurped_between_saves, TWO, words, str(save), str(metrics))
    assert "has taken over" in outcomes[0].error and outcomes[1].error == "exit 2"
    assert locks(tmp_path) == ["run.lock.2"] and not candidates(save).iterations


@pytest.mark.parametrize(
    ("flags", "error"),
    [([], ""), (["--exit-interval", "2"], ""), (["--load", "/"], "there is no checkpoint")],
)
def test_nothing_remains_of_the_lock(
    world: World, tmp_path: Path, flags: list[str], error: str
) -> None:
    words = ["--save", str(tmp_path / "save"), "--metrics-file", str(tmp_path / "m"), *flags]
    (outcome,) = world.run(run_pretrain, Layout(), words)
    assert error in outcome.error and locks(tmp_path) == []
    assert not error or list(tmp_path.iterdir()) == []


def test_a_dry_run_asks_nobody(tmp_path: Path) -> None:
    from megatron_kvshare.cli.main import main

    assert main(["pretrain", *SMALL, "--save", str(tmp_path / "save"), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(ROUNDS))
def test_natural_races(tmp_path: Path, number: int) -> None:
    """Two runs of different seeds, started in the same moment, or a little later."""
    save, seeds = tmp_path / "save", (11, 12)
    flags = ["--train-iters", "100000", "--save-interval", "5", "--save", str(save)]
    with contextlib.ExitStack() as stack:
        both = []
        for seed in seeds:
            words = [*flags, "--seed", str(seed)]
            both.append(stack.enter_context(started(tmp_path / f"log{seed}", 1, words)))
            time.sleep(0.3 * number)
        wait_until(lambda: any(each.one_has_ended() for each in both))
        winner = 0 if both[1].one_has_ended() else 1
        loser = both[1 - winner]
        assert loser.wait() == [2], loser.output(0)
        wait_until(lambda: len(candidates(save).iterations) > 1)
        both[winner].kill(number=signal.SIGTERM)
        assert both[winner].wait() == [75], both[winner].output(0)
    assert f"belongs to process {both[winner].processes[0].pid} on " in loser.output(0)
    for step in candidates(save).iterations:
        folder = iteration_folder(save, step)
        manifest = read_manifest(folder)
        assert problems(folder, manifest.files) == []
        assert manifest.config["seed"] == seeds[winner]
    assert locks(save) == []


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.nightly
def test_a_run_that_was_killed_goes_on_at_once(tmp_path: Path) -> None:
    save = tmp_path / "save"
    flags = ["--train-iters", "200", "--save-interval", "5", "--save", str(save)]
    flags += ["--resume", "auto"]
    with started(tmp_path / "first", 1, flags) as ranks:
        assert ranks.wait_until(lambda: bool(candidates(save).iterations)), ranks.output(0)
        ranks.kill()
        ranks.wait()
    assert locks(save) == ["run.lock.1"]
    with started(tmp_path / "second", 1, flags) as ranks:
        assert ranks.wait(PATIENCE_SECONDS) == [0], ranks.output(0)
        assert "waiting up to" not in ranks.output(0) and "Continuing from" in ranks.output(0)
    assert locks(save) == []
