"""Pretraining runs from start to end: metrics, resume, layouts, NaN, fine-tuning, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kvshare.cli.main import main
from tests.distributed.world import PATIENCE_SECONDS, Layout, World
from tests.integration.pretrain_jobs import (
    SMALL,
    Accident,
    Outcome,
    losses,
    records,
    run_pretrain,
    set_latest,
)

ONE, TWO = Layout(), Layout(data=2)


def run(
    world: World, layout: Layout, metrics: Path, *flags: object, accident: Accident | None = None
) -> list[Outcome]:
    words = ["--metrics-file", str(metrics), *map(str, flags)]
    return world.run(run_pretrain, layout, words, accident)


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on one rank, saved after the third and the last."""
    root = tmp_path_factory.mktemp("trained")
    (outcome,) = run(world, ONE, root / "m.jsonl", "--save", root / "save", "--save-interval", 3)
    (root / "output.txt").write_text(outcome.output)
    return root


def test_metrics_file(trained: Path) -> None:
    lines = records(trained / "m.jsonl")
    steps = [each for each in lines if "loss" in each]
    assert [each["step"] for each in steps] == [1, 2, 3, 4, 5, 6]
    assert [each["tokens"] for each in steps] == [256 * step for step in range(1, 7)]
    names = {"lr", "grad_norm", "tokens_per_second", "tflops", "mfu", "kv_residual"}
    assert all(names <= each.keys() for each in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert [each["step"] for each in lines if "valid_loss" in each] == [4, 6]


def test_what_a_run_says(trained: Path) -> None:
    output = (trained / "output.txt").read_text()
    for text in ("map 0_2_2_3", "parameters ", "global batch 8 sequences", "mock data"):
        assert text in output
    valid = records(trained / "m.jsonl")[-1]
    assert f"validation perplexity {valid['valid_perplexity']:.2f}" in output
    assert f"Checkpoint: {trained / 'save' / 'iter_0000006'}" in output
    assert "--finetune --load" in output.splitlines()[-3]  # its learning rate has ended at 0


def in_a_fresh_process(flags: list[str]) -> subprocess.CompletedProcess[str]:
    """A run of `SMALL` with more flags."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_kvshare", "pretrain", *SMALL, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_a_longer_run_says_what_becomes_of_its_learning_rate(trained: Path) -> None:
    flags = ["--load", str(trained / "save"), "--train-iters", "8", "--eval-iters", "0"]
    done = in_a_fresh_process(flags)
    assert done.returncode == 0, done.stderr
    assert "the learning rate goes from 0 in step 6 to" in done.stderr
    assert "--train-iters was 6, now 8" in done.stderr


def test_resume_in_a_fresh_process_is_bit_identical(trained: Path, tmp_path: Path) -> None:
    set_latest(trained / "save", 3)
    flags = ["--load", str(trained / "save"), "--metrics-file", str(tmp_path / "m.jsonl")]
    done = in_a_fresh_process(flags)
    set_latest(trained / "save", 6)
    assert done.returncode == 0, done.stderr
    assert "the learning rate goes" not in done.stderr
    whole = losses(trained / "m.jsonl")
    assert losses(tmp_path / "m.jsonl") == {step: whole[step] for step in (4, 5, 6)}
    assert records(tmp_path / "m.jsonl")[-1] == records(trained / "m.jsonl")[-1]


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        (ONE, ["--micro-batch-size", 8]),
        (TWO, ["--micro-batch-size", 1]),
        (TWO, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
        (Layout(tensor=2, sequence_parallel=True), []),
        (Layout(pipeline=2, virtual=2), ["--use-distributed-optimizer"]),
    ],
    ids=["one micro-batch", "dp2", "dp2-distributed-overlap", "tp2-sp", "pp2-vpp2"],
)
def test_layouts_agree(
    world: World, trained: Path, tmp_path: Path, layout: Layout, flags: list
) -> None:
    run(world, layout, tmp_path / "m.jsonl", *flags)
    assert losses(tmp_path / "m.jsonl") == pytest.approx(losses(trained / "m.jsonl"), rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=2, virtual=2),
        pytest.param(Layout(tensor=2), marks=pytest.mark.nightly),
        pytest.param(Layout(pipeline=2), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_weights_load_on_another_layout(
    world: World, trained: Path, tmp_path: Path, layout: Layout
) -> None:
    """The optimizer follows too; fine-tuning takes the weights and starts counting anew."""
    set_latest(trained / "save", 3)
    load = ["--load", trained / "save"]
    run(world, layout, tmp_path / "a.jsonl", *load)
    whole = losses(trained / "m.jsonl")
    expected = {step: whole[step] for step in (4, 5, 6)}
    assert losses(tmp_path / "a.jsonl") == pytest.approx(expected, rel=1e-5)
    set_latest(trained / "save", 6)
    run(world, layout, tmp_path / "b.jsonl", *load, "--finetune", "--train-iters", 1)
    assert losses(tmp_path / "b.jsonl")[1] < whole[4]


def test_nan_on_one_rank_skips_the_step_on_all(world: World, tmp_path: Path) -> None:
    outcomes = run(
        world, TWO, tmp_path / "m.jsonl", accident=Accident(1, 3)
    )  # 2 micro-batches: step 2
    assert [(each.step, each.skipped_steps) for each in outcomes] == [(6, 1), (6, 1)]
    lines = {each["step"]: each for each in records(tmp_path / "m.jsonl") if "loss" in each}
    assert lines[2]["loss"] is None and lines[2]["skipped"]
    assert lines[3]["loss"] > 4 and "skipped" not in lines[3]
    assert lines[6]["skipped_steps"] == 1


def test_nan_can_stop_the_run(world: World, tmp_path: Path) -> None:
    first, second = run(
        world, TWO, tmp_path / "m.jsonl", "--nan-policy", "stop", accident=Accident(1, 3)
    )
    assert "step 2" in first.error and "--nan-policy is stop" in first.error
    assert second.error == "exit 2"


def test_a_checkpoint_of_another_model_is_refused_once(
    world: World, trained: Path, tmp_path: Path
) -> None:
    flags = ["--load", trained / "save", "--kv-pattern", "pizza-bottom", "--vocab-size", 101]
    first, second = run(world, TWO, tmp_path / "m.jsonl", *flags)
    assert "--kv-map" in first.error and "--vocab-size = 101" in first.error
    assert second.error == "exit 2"


def test_a_damaged_checkpoint_is_passed_over(world: World, tmp_path: Path) -> None:
    """Training goes on from the one before, and stops only where none is sound."""
    folder = tmp_path / "save"
    run(world, TWO, tmp_path / "a.jsonl", "--save", folder, "--save-interval", 3)
    (part,) = list((folder / "iter_0000006").glob("__1_*.distcp"))[:1]
    part.write_bytes(part.read_bytes()[:100])
    outcomes = run(world, TWO, tmp_path / "b.jsonl", "--load", folder)
    assert [outcome.step for outcome in outcomes] == [6, 6]
    whole = losses(tmp_path / "a.jsonl")
    assert losses(tmp_path / "b.jsonl") == {step: whole[step] for step in (4, 5, 6)}
    (folder / "iter_0000003" / ".metadata").unlink()
    first, second = run(world, TWO, tmp_path / "c.jsonl", "--load", folder)
    assert "has 100 bytes" in first.error and ".metadata cannot be read" in first.error
    assert second.error == "exit 2"


def test_nothing_left_to_train(world: World, trained: Path, tmp_path: Path) -> None:
    flags = ["--load", trained / "save", "--save", trained / "save"]
    (outcome,) = run(world, ONE, tmp_path / "m.jsonl", *flags)
    assert outcome.step == 6 and not losses(tmp_path / "m.jsonl")
    valid = records(trained / "m.jsonl")[-1]
    assert f"validation perplexity {valid['valid_perplexity']:.2f}" in outcome.output


def test_dry_run_needs_no_process_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    flags = ["--tensor-model-parallel-size", "2", "--dry-run"]
    flags += ["--save", str(tmp_path), "--async-save"]
    assert main(["pretrain", *SMALL, *flags]) == 0
    output = capsys.readouterr().out
    for text in ("num_layers", "tensor parallel 2", "parameters ", "memory per process", "mock"):
        assert text in output
    assert "--async-save: a copy of up to " in output
    assert "validation" not in output


def test_loading_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *SMALL, "--load", str(tmp_path / "none")]) == 2
    assert "--load" in capsys.readouterr().err
