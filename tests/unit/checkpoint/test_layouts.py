"""Folders of both layouts in one place: which is loaded, which goes, what the trackers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.folder import Keep, candidates, iteration_folder, publish
from megatron_kvshare.checkpoint.load import newest_sound
from megatron_kvshare.checkpoint.manifest import Layout, Manifest, Progress
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.config.derive import checkpoint_settings, step_of_tag
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import CheckpointError, ConfigError


def write(root: Path, step: int, layout: Layout) -> Path:
    target = iteration_folder(root, step, layout)
    aside = folders.begin(target)
    Manifest({}, Progress(step), 1, 1, False, layout=layout).write(aside)
    publish(aside, target, step)
    return target


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, 2, "native")
    write(tmp_path, 4, "deepspeed")
    write(tmp_path, 6, "deepspeed")
    return tmp_path


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_both_are_candidates(root: Path):
    assert names(root) == {
        "iter_0000002",
        "global_step4",
        "global_step6",
        "latest",
        "latest_checkpointed_iteration.txt",
    }
    assert candidates(root) == ([6, 4, 2], None)
    found = [iteration_folder(root, step).name for step in (2, 4, 6)]
    assert found == ["iter_0000002", "global_step4", "global_step6"]
    assert (root / "latest").read_text() == "global_step6"


def test_the_other_layout_of_the_same_step_goes(root: Path):
    """And what DeepSpeed's tools would take for the newest."""
    write(root, 6, "native")
    assert names(root) == {
        "iter_0000002",
        "global_step4",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    }
    write(root, 6, "deepspeed")
    assert "global_step6" in names(root) and "iter_0000006" not in names(root)
    assert (root / "latest").read_text() == "global_step6"


def test_superseded_ones_of_both_layouts_go(root: Path):
    foreign = root / "global_step1"
    foreign.mkdir()
    assert folders.remove_superseded(root, 6, Keep(last=1)) == []
    assert {each for each in names(root) if "latest" not in each} == {"global_step6", foreign.name}


def test_a_killed_replacement_is_repaired(root: Path):
    (root / "global_step6").rename(root / f"global_step6{folders.OLD}")
    folders.repair(root)
    assert candidates(root).iterations == [6, 4, 2]


def test_lost_folders_leave_traces(root: Path):
    import shutil

    for name in ("iter_0000002", "global_step4", "global_step6"):
        shutil.rmtree(root / name)
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert len(folders.traces(root)) == 1 and "latest" in folders.traces(root)[0]


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        (["--ckpt-step", "4"], 4),
        (["--engine", "deepspeed", "--load-tag", "global_step4"], 4),
        (["--engine", "deepspeed", "--load-tag", "iter_0000002"], 2),
        (["--engine", "deepspeed", "--load_tag", "global_step2", "--ckpt-step", "2"], 2),
    ],
)
def test_an_older_one_is_asked_for(root: Path, flags: list[str], step: int, single):
    words = ["--mock-data", "--vocab-size", "64", "--num-layers", "2", "--load", str(root)]
    settings = checkpoint_settings(parse_pretrain([*words, *flags]))
    assert newest_sound(settings, single).iteration == step


@pytest.mark.parametrize("tag", ["latest", "global_step", "global_step4/..", "iter_x", "step4"])
def test_other_tags_are_refused(root: Path, tag: str):
    assert step_of_tag(tag) is None
    words = ["--mock-data", "--vocab-size", "64", "--num-layers", "2", "--load", str(root)]
    with pytest.raises(ConfigError, match="global_step1000"):
        parse_pretrain([*words, "--engine", "deepspeed", "--load-tag", tag])


def test_a_step_that_is_not_there(root: Path, single):
    settings = replace(CheckpointConfig(load=str(root)), ckpt_step=5)
    with pytest.raises(CheckpointError, match="the newest there are: 6, 4, 2"):
        newest_sound(settings, single)
