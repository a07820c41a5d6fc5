"""Checkpoints in DeepSpeed's layout: one process reads the state of every ZeRO stage by name,
DeepSpeed resumes on as many ranks, and either engine goes on with what the other has saved.

The state itself is compared with what the live engine holds, and with DeepSpeed's own converter.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_kvshare.checkpoint.deepspeed_shards import read_shards
from megatron_kvshare.checkpoint.manifest import read_manifest
from megatron_kvshare.checkpoint.reader import open_checkpoint, whole_model
from megatron_kvshare.checkpoint.tensors import NativeTensors, stored_tensors
from megatron_kvshare.cli.main import main
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.engines.deepspeed import DeepSpeedEngine
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.megatron_api.optimizer_state import MOMENTS
from megatron_kvshare.model.parameters import gather_by_name, parameter_pieces
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train import saving, setup
from megatron_kvshare.train.step import train_step
from tests.distributed.jobs import Case
from tests.distributed.test_deepspeed import MIDDLE, STANDARD, TOP, by_deepspeed, case
from tests.distributed.world import Layout, World

DP2, TP2 = Layout(data=2), Layout(tensor=2, data=2, sequence_parallel=True)
SAVED, MORE = 2, 2
"""Steps before and after the checkpoint."""


class Saved(NamedTuple):
    """`weights` and `moments` of the live engine, by name; losses of the steps after the save, had
    nothing happened."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    losses: list[float]


def planned(case: Case, layout: Layout, **checkpoint: Any) -> RunPlan:
    config = replace(case.config(layout), checkpoint=CheckpointConfig(**checkpoint))
    return RunPlan.of(config, layout.world_size)


def save(state, layout: Layout, case: Case, folder: str) -> Saved:
    run = setup.prepare(planned(case, layout, save=folder), state)
    batches = run.data.train_batches(0)
    for step in range(1, SAVED + 1):
        train_step(run, batches, step)
        run.progress = replace(run.progress, step=step, samples=8 * step)
    saving.save(run)
    with run.engine.whole_weights():
        weights = gather_by_name(run.engine.stages, state)
    losses = [train_step(run, batches, SAVED + 1 + step).loss for step in range(MORE)]
    return Saved(weights, {}, losses)


def resume(state, layout: Layout, case: Case, folder: str) -> tuple[list[float], bool]:
    """The losses after it, and whether DeepSpeed itself has read the files."""
    by_name = DeepSpeedEngine._load_by_name
    called = []
    DeepSpeedEngine._load_by_name = lambda self, found: (called.append(1), by_name(self, found))
    try:
        run = setup.prepare(planned(case, layout, load=folder), state)
    finally:
        DeepSpeedEngine._load_by_name = by_name
    batches = run.data.train_batches(run.progress.samples)
    losses = [train_step(run, batches, SAVED + 1 + step).loss for step in range(MORE)]
    return losses, isinstance(run.engine, DeepSpeedEngine) and not called


def moments(state, layout: Layout, case: Case, folder: str) -> dict[str, Tensor]:
    """What the engine holds of AdamW's state, put together by the engine's own shares."""
    run = setup.prepare(planned(case, layout, load=folder), state)
    (stage,) = run.engine.stages
    found = {}
    with run.engine.whole_weights():
        pieces, named = parameter_pieces(stage), dict(stage.named_parameters())
        shapes = {name: weight.shape for name, weight in named.items()}
    for name, weight in named.items():
        held = run.engine.shares.held(weight)
        for kind in MOMENTS:
            whole = torch.zeros(shapes[name])
            if held is not None:
                flat = held.tensors[kind]
                whole.view(-1)[held.start : held.start + flat.numel()] = flat
            if run.engine.shares.divided:
                torch.distributed.all_reduce(whole, group=state.dp_group)
            for piece in pieces[name]:
                found[kind, piece.name, state.tp_rank] = (piece, piece.of_local(whole).clone())
    return {} if state.dp_rank else found


STAGES = [
    pytest.param(MIDDLE, DP2, 1, id="middle-dp2-zero1"),
    pytest.param(TOP, DP2, 3, id="top-dp2-zero3"),
    pytest.param(TOP, DP2, 0, id="top-dp2-zero0", marks=pytest.mark.nightly),
    pytest.param(STANDARD, DP2, 2, id="standard-dp2-zero2", marks=pytest.mark.nightly),
    pytest.param(MIDDLE, TP2, 1, id="middle-tp2-zero1", marks=pytest.mark.nightly),
    pytest.param(MIDDLE, TP2, 2, id="middle-tp2-zero2", marks=pytest.mark.nightly),
    pytest.param(TOP, TP2, 3, id="top-tp2-zero3", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("map", "layout", "stage"), STAGES)
def test_state_and_resume(map: str, layout: Layout, stage: int, world: World, tmp_path, single):
    """By name in one process, by DeepSpeed, and by the other engine on other ranks."""
    mine, folder = by_deepspeed(case(map, SAVED), stage), str(tmp_path / "save")
    saved: Saved = world.run(save, layout, mine, folder)[0]
    stored = open_checkpoint(Path(folder))
    assert stored.folder.name == f"global_step{SAVED}" and stored.manifest.layout == "deepspeed"
    assert (tmp_path / "save" / "latest").read_text() == stored.folder.name
    assert set(saved.weights) == set(stored.weights.tensors)
    for name, weight in saved.weights.items():
        assert torch.equal(stored.weights.read(name), weight), name
    held = [each for rank in world.run(moments, layout, mine, folder) for each in rank.items()]
    tensors = stored_tensors(stored.folder, stored.manifest)
    for (kind, name, _), (piece, part) in held:
        whole = tensors.read(f"optimizer.state.{kind}.{name}")
        assert torch.equal(piece.of_full(whole), part), (kind, name)
    again, by_itself = world.run(resume, layout, mine, folder)[0]
    assert by_itself and again == pytest.approx(saved.losses, rel=1e-6)
    other = Layout() if layout == DP2 else DP2
    megatron = replace(case(map, SAVED), train={**case(map, SAVED).train, "micro_batch_size": 2})
    losses, _ = world.run(resume, other, megatron, folder)[0]
    assert losses == pytest.approx(saved.losses, rel=1e-5)


RESHARDED = [
    pytest.param(DP2, 2, Layout(), 2, id="zero2-2-to-1"),
    pytest.param(DP2, 2, Layout(data=4), 2, id="zero2-2-to-4"),
    pytest.param(DP2, 3, TP2, 1, id="zero3-dp2-to-zero1-tp2"),
    pytest.param(TP2, 1, DP2, 3, id="zero1-tp2-to-zero3-dp2"),
]


@pytest.mark.nightly
@pytest.mark.parametrize(("layout", "stage", "other", "other_stage"), RESHARDED)
def test_other_ranks_and_stages(layout, stage, other, other_stage, world: World, tmp_path):
    mine, folder = case(TOP, SAVED), str(tmp_path / "save")
    small = replace(mine, train={**mine.train, "micro_batch_size": 1})
    saved: Saved = world.run(save, layout, by_deepspeed(mine, stage), folder)[0]
    losses, by_itself = world.run(resume, other, by_deepspeed(small, other_stage), folder)[0]
    assert not by_itself and losses == pytest.approx(saved.losses, rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 3])
def test_from_megatron_to_deepspeed(stage: int, world: World, tmp_path):
    mine, folder = case(TOP, SAVED), str(tmp_path / "save")
    saved: Saved = world.run(save, DP2, mine, folder)[0]
    losses, _ = world.run(resume, DP2, by_deepspeed(mine, stage), folder)[0]
    assert losses == pytest.approx(saved.losses, rel=1e-5)


@pytest.fixture(scope="module")
def zero3(world: World, tmp_path_factory) -> tuple[Path, Saved]:
    """A --save folder of two ranks at ZeRO 3; it may be copied and not changed."""
    folder = tmp_path_factory.mktemp("zero3") / "save"
    return folder, world.run(save, DP2, by_deepspeed(case(TOP, SAVED), 3), str(folder))[0]


def test_converters(zero3: tuple[Path, Saved], tmp_path, single, capsys):
    """Ours, to a native checkpoint with optimizer state; and DeepSpeed's, that lies beside it."""
    folder, saved = zero3
    native = tmp_path / "native"
    assert main(["convert", "to-native", "--load", str(folder), "--save", str(native)]) == 0
    assert "bit by bit" in capsys.readouterr().err
    found = NativeTensors(native / f"iter_{SAVED:07d}")
    assert {f"optimizer.state.{kind}.{name}" for kind in MOMENTS for name in saved.weights} < set(
        found.tensors
    )
    for name, weight in saved.weights.items():
        assert torch.equal(found.read(name), weight)
    converter = [sys.executable, str(folder / "zero_to_fp32.py"), str(folder), str(tmp_path / "fp")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(converter, check=True, capture_output=True, env=environment)
    theirs = torch.load(tmp_path / "fp" / "pytorch_model.bin", weights_only=True)
    shards = read_shards(folder / f"global_step{SAVED}")[0]
    assert set(shards.parameters) == set(theirs)
    assert all(torch.equal(shards.read(name, "fp32"), each) for name, each in theirs.items())


def test_an_export_of_shards_is_the_model(zero3: tuple[Path, Saved], tmp_path, single):
    folder, saved = zero3
    out = tmp_path / "hf"
    words = ["--load", str(folder), "--save", str(out), "--without-tokenizer"]
    assert main(["convert", "to-hf", *words]) == 0
    stored = open_checkpoint(folder)
    model = whole_model(stored.spec, stored.weights, single)
    assert all(
        torch.equal(weight, saved.weights[name])
        for name, weight in gather_by_name([model], single).items()
    )


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [DP2, TP2], ids=["dp2", "tp2"])
@pytest.mark.parametrize("stage", [1, 3])
def test_universal_checkpoints(layout: Layout, stage: int, world: World, tmp_path):
    """DeepSpeed's converter puts the tensors together that our table of tensors describes."""
    folder, out = tmp_path / "save", tmp_path / "universal"
    world.run(save, layout, by_deepspeed(case(TOP, SAVED), stage), str(folder))
    program = (
        "from deepspeed.checkpoint.ds_to_universal import main, parse_arguments as p; main(p())"
    )
    inner = folder / f"global_step{SAVED}"
    words = ["--input_folder", str(inner), "--output_folder", str(out)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", program, *words, "--no_strict"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = read_shards(inner)
    for name, held in whole[0].parameters.items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            path = out / "zero" / name / f"{kind}.pt"
            found = torch.load(path, weights_only=True)
            found = found["param"] if isinstance(found, dict) else found
            parts = [shards.read(name, kind) for shards in whole]
            if len(parts) == 1 or all(part.equal(parts[0]) for part in parts):
                assert found.flatten()[: parts[0].numel()].equal(parts[0].flatten()), name
            else:
                mine = torch.cat([part.flatten() for part in parts]).sort().values
                assert found.flatten().sort().values[-mine.numel() :].equal(mine) or held, name


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def damage(folder: Path, kind: str) -> str:
    """The name of a file that is spoilt."""
    if kind == "missing":
        path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        path.unlink()
        return path.name
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "runs code":
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                is_pickle = name.endswith("data.pkl")
                archive.writestr(name, pickle.dumps(Harmful()) if is_pickle else content)
    elif kind == "another class":
        torch.save({"optimizer_state_dict": argparse.Namespace(zero_stage=3)}, path)
    else:
        torch.save([1, 2], path)
    return path.name


@pytest.mark.parametrize("kind", ["missing", "cut off", "runs code", "another class", "a list"])
def test_damage(kind: str, zero3: tuple[Path, Saved], tmp_path, monkeypatch):
    """One message that names the file; with the marks of the manifest and without them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zero3[0], tmp_path / "save")
    folder = tmp_path / "save" / f"global_step{SAVED}"
    name = damage(folder, kind)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path / "save")
    with pytest.raises(CheckpointError, match=name):
        stored_tensors(folder, read_manifest(folder))
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_somebody_else(tmp_path):
    """DeepSpeed's files without our manifest say nothing of map, data or tokenizer."""
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "latest").write_text("global_step5")
    with pytest.raises(CheckpointError, match="no checkpoint of megatron_kvshare"):
        open_checkpoint(tmp_path)
