"""Runs whose training data changes on the way: resumed on either side of the boundary, refused with
other stages, counted by source; and older checkpoints that know nothing of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy
import pytest

from megatron_kvshare.checkpoint.manifest import MANIFEST, read_manifest
from megatron_kvshare.megatron_api.datasets import TokenFileWriter
from tests.distributed.world import Layout, World
from tests.integration.pretrain_jobs import Outcome, losses, records, run_pretrain, set_latest

ONE, TWO = Layout(), Layout(data=2)
STEP_TOKENS = 8 * 32
BOUNDARY = 29
"""A sample inside step 4."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("web", "math", "held_out", "test")):
        writer = TokenFileWriter(folder / f"{name}.bin", 100)
        for start in range(40):
            writer.add_document((start * (number + 1) + numpy.arange(100)) % (90 + number))
        writer.finalize(folder / f"{name}.idx")
    (folder / "stages.yaml").write_text(
        f"- from-tokens: {BOUNDARY * 32 - 5}\n"
        f"  data-path: [0.25, {folder / 'web'}, 0.75, {folder / 'math'}]\n"
    )
    return folder


def run(
    world: World, layout: Layout, data: Path, metrics: Path, *flags: object, staged: bool = True
) -> list[Outcome]:
    words = ["--train-data-path", data / "web", "--valid-data-path", data / "held_out"]
    words += ["--data-stages", data / "stages.yaml"] if staged else []
    return world.run(
        run_pretrain, layout, [*map(str, [*words, *flags]), "--metrics-file", str(metrics)]
    )


@pytest.fixture(scope="module")
def whole(world: World, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one rank, saved after each."""
    root = tmp_path_factory.mktemp("whole")
    save = ("--save", root / "save", "--save-interval", 1)
    test = ("--test-data-path", data / "test")
    (outcome,) = run(world, ONE, data, root / "m.jsonl", *save, *test)
    assert outcome.error == ""
    (root / "output.txt").write_text(outcome.output)
    return root


def counted(path: Path) -> dict[int, dict[str, int]]:
    """Tokens by the last part of the name of their source, after every step."""
    return {
        line["step"]: {Path(name).name: count for name, count in line["tokens_by_source"].items()}
        for line in records(path)
        if "loss" in line
    }


def test_what_is_read_is_counted(whole: Path) -> None:
    """The stage gives a quarter of its samples to the first source; each line adds up."""
    found = counted(whole / "m.jsonl")
    assert found[3] == {"web": 3 * STEP_TOKENS}
    assert all(sum(found[step].values()) == step * STEP_TOKENS for step in found)
    staged = 6 * 8 - BOUNDARY
    assert found[6]["math"] == pytest.approx(0.75 * staged * 32, abs=32)
    stages = [line["data_stage"] for line in records(whole / "m.jsonl") if "loss" in line]
    assert stages == [1, 1, 1, 2, 2, 2]
    stored = read_manifest(whole / "save" / "iter_0000006").progress
    assert {Path(n).name: count for n, count in stored.tokens_by_source.items()} == found[6]


def test_it_says_what_it_will_read_and_tests_at_the_end(whole: Path) -> None:
    output = (whole / "output.txt").read_text()
    before = output[: output.index("step 1/6")]
    assert f"takes over with sample {BOUNDARY}" in before and "epochs" in before
    lines = records(whole / "m.jsonl")
    (test,) = [line for line in lines if "test_loss" in line]
    assert test["step"] == 6 and test is lines[-1]
    assert test["test_loss"] != lines[-2]["valid_loss"]
    assert f"Test loss {test['test_loss']:.4f}" in output


@pytest.mark.parametrize(("after", "layout"), [(3, ONE), (4, ONE), (3, TWO)], ids=str)
def test_resume_is_exact_across_the_boundary(
    world: World, whole: Path, data: Path, tmp_path: Path, after: int, layout: Layout
) -> None:
    """To the bit on the same layout; the counts on any."""
    set_latest(whole / "save", after)
    path = tmp_path / "m.jsonl"
    outcomes = run(world, layout, data, path, "--load", whole / "save")
    assert outcomes[0].error == ""
    expected = {step: loss for step, loss in losses(whole / "m.jsonl").items() if step > after}
    tolerance = 0 if layout == ONE else 1e-5
    assert losses(path) == pytest.approx(expected, rel=tolerance, abs=0)
    assert counted(path) == {s: n for s, n in counted(whole / "m.jsonl").items() if s > after}


def test_other_stages_are_refused_unless_they_are_meant(
    world: World, whole: Path, data: Path, tmp_path: Path
) -> None:
    set_latest(whole / "save", 3)
    load = ("--load", whole / "save")
    (outcome,) = run(world, ONE, data, tmp_path / "m.jsonl", *load, staged=False)
    assert f"from sample {BOUNDARY} on 0.25 x" in outcome.error
    assert "now none" in outcome.error and "--data-change-ok" in outcome.error
    load += ("--data-change-ok",)
    (outcome,) = run(world, ONE, data, tmp_path / "m.jsonl", *load, staged=False)
    assert outcome.error == "" and "stages was from sample" in outcome.warnings
    assert counted(tmp_path / "m.jsonl")[6] == {"web": 6 * STEP_TOKENS}


def test_a_checkpoint_of_format_8_goes_on_and_is_counted(
    world: World, data: Path, tmp_path: Path
) -> None:
    """It had no stages and no counts; what it has read follows from the data."""
    save = ("--save", tmp_path / "save", "--save-interval", 3)
    run(world, ONE, data, tmp_path / "m.jsonl", *save, staged=False)
    manifest = tmp_path / "save" / "iter_0000003" / MANIFEST
    values = json.loads(manifest.read_text())
    del values["data"]["stages"], values["progress"]["tokens_by_source"], values["sha256"]
    values["format_version"] = 8
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(values | {"sha256": digest}))
    set_latest(tmp_path / "save", 3)
    load = ("--load", tmp_path / "save")
    (outcome,) = run(world, ONE, data, tmp_path / "again.jsonl", *load, staged=False)
    assert outcome.error == ""
    assert losses(tmp_path / "again.jsonl") == {
        step: loss for step, loss in losses(tmp_path / "m.jsonl").items() if step > 3
    }
    assert counted(tmp_path / "again.jsonl")[6] == {"web": 6 * STEP_TOKENS}
    (outcome,) = run(world, ONE, data, tmp_path / "again.jsonl", *load)
    assert "stages was none, now from sample" in outcome.error
