"""Nobody's checkpoint runs code, whichever of its pickles would; all marks in these fit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_kvshare.checkpoint.integrity import mark
from megatron_kvshare.checkpoint.manifest import MANIFEST, _digest
from megatron_kvshare.checkpoint.pickles import COMMON, METADATA, read_metadata
from megatron_kvshare.checkpoint.reader import open_checkpoint
from megatron_kvshare.errors import CheckpointError
from tests.distributed.world import Layout, World
from tests.integration.pretrain_jobs import run_pretrain
from tests.integration.test_older_checkpoints import SMALLEST

TWO = Layout(data=2)
WEIGHT = "model.norm.weight"
Attack = Callable[[Path, Path], None]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def list_of_tensors(folder: Path, trace: Path) -> None:
    metadata = read_metadata(folder)
    metadata.planner_data = Evil(trace)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def common(folder: Path, trace: Path) -> None:
    torch.save(Evil(trace), folder / COMMON)


def tensor(folder: Path, trace: Path) -> None:
    replace_record(folder, trace, MetadataIndex(WEIGHT, (0,)))


def optimizer_tensor(folder: Path, trace: Path) -> None:
    replace_record(folder, trace, MetadataIndex(f"optimizer.state.exp_avg.{WEIGHT}", (0,)))


def object_of_a_rank(folder: Path, trace: Path) -> None:
    replace_record(folder, trace, MetadataIndex("random_state/shard_0_2"))


def replace_record(folder: Path, trace: Path, index: MetadataIndex) -> None:
    metadata = read_metadata(folder)
    place = metadata.storage_data[index]
    with (folder / place.relative_path).open("ab") as file:
        place.offset = file.tell()
        torch.save(Evil(trace), file)
        place.length = file.tell() - place.offset
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def sign(folder: Path) -> None:
    """Make all marks of the folder fit, as whoever made it would."""
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    values["files"] = {name: mark(folder / name) for name in values["files"]}
    values["sha256"] = _digest(values)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def format_6(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("format_6")
    words = [*SMALLEST, "--save", str(root), "--train-iters", "3"]
    world.run(run_pretrain, TWO, words)
    return root


def test_the_attacks_have_teeth(format_4: Path, tmp_path: Path) -> None:
    list_of_tensors_file = tmp_path / "copy"
    shutil.copytree(format_4 / "replicated" / "iter_0000003", list_of_tensors_file)
    list_of_tensors(list_of_tensors_file, tmp_path / "first")
    pickle.loads((list_of_tensors_file / METADATA).read_bytes())
    common(list_of_tensors_file, tmp_path / "second")
    torch.load(list_of_tensors_file / COMMON, weights_only=False)
    assert (tmp_path / "first").is_dir() and (tmp_path / "second").is_dir()


@pytest.mark.parametrize(
    ("made_by", "attack"),
    [
        ("format_4", list_of_tensors),
        ("format_4", common),
        ("format_4", tensor),
        ("format_4", object_of_a_rank),
        ("format_6", list_of_tensors),
        ("format_6", optimizer_tensor),
    ],
)
def test_a_run_refuses_it_and_nothing_has_run(
    world: World, request: pytest.FixtureRequest, tmp_path: Path, made_by: str, attack: Attack
) -> None:
    original = request.getfixturevalue(made_by)
    shutil.copytree(original / "replicated" if made_by == "format_4" else original, tmp_path / "a")
    folder, trace = tmp_path / "a" / "iter_0000003", tmp_path / "trace"
    attack(folder, trace)
    sign(folder)
    outcomes = world.run(run_pretrain, TWO, [*SMALLEST, "--load", str(tmp_path / "a")])
    errors = [outcome.error for outcome in outcomes]
    assert "exit 2" in errors
    (message,) = (error for error in errors if error != "exit 2")
    assert "checkpoint error" in message and "cannot be read" in message
    assert not trace.exists()


@pytest.mark.parametrize("attack", [list_of_tensors, tensor])
def test_so_does_a_single_process(format_6: Path, tmp_path: Path, attack: Attack) -> None:
    shutil.copytree(format_6, tmp_path / "a")
    folder, trace = tmp_path / "a" / "iter_0000003", tmp_path / "trace"
    attack(folder, trace)
    sign(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "a").weights.read(WEIGHT)
    assert not trace.exists()
