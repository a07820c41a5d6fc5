"""Checkpoints that were cut off or changed: found out, and the one before is used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.load import newest_sound
from megatron_kvshare.checkpoint.manifest import Manifest, Progress
from megatron_kvshare.checkpoint.save import save_checkpoint
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.model.parameters import initialize
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import TINY, model_spec

TOP = build_map(4, "sandwich-top", 2)
TIMES = 200
"""How often a random byte is cut at, or a random bit turned."""


@pytest.fixture(scope="module")
def two(tmp_path_factory, single) -> Path:
    """Checkpoints of steps 3 and 5."""
    root = tmp_path_factory.mktemp("two")
    model = TINY.model(TOP, single)
    for step in (3, 5):
        initialize(model, step)
        about = model_spec(TOP).identity
        manifest = Manifest(about, Progress(step), 1, 1, False)
        save_checkpoint(root, manifest, [model], None, single)
    return root


def newest(root: Path, single):
    return newest_sound(CheckpointConfig(load=str(root)), single)


def test_nothing_is_wrong_with_what_was_written(two, single):
    assert newest(two, single) == (5, ())
    assert not list(two.glob("*.partial")) and not list(two.glob("*.old"))


@pytest.mark.parametrize("how", ["cut", "bit"])
def test_any_damage_to_any_file_is_found(how, two, tmp_path, single):
    draw = random.Random(1)
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    files = sorted(path for path in folders.iteration_folder(root, 5).iterdir())
    assert len(files) == 3
    for _ in range(TIMES // 2):
        path = draw.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        place = draw.randrange(len(content))
        if how == "cut":
            del damaged[place:]
        else:
            damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = newest(root, single)
        path.write_bytes(content)
        if found.iteration == 5:  # space between the words of the manifest
            assert path.name == "kvshare.json" and damaged.split() == content.split(), path
        else:
            assert found.iteration == 3
            assert len(found.warnings) == 1 and "iter_0000005 is damaged" in found.warnings[0]


@pytest.mark.parametrize("damage", ["empty", "words", "gone folder", "missing"])
def test_without_a_tracker_the_newest_folder_counts(damage, two, tmp_path, single):
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    tracker = root / folders.TRACKER
    if damage == "missing":
        tracker.unlink()
    else:
        tracker.write_text({"empty": "", "words": "latest", "gone folder": "9"}[damage])
    found = newest(root, single)
    assert found.iteration == 5
    assert folders.TRACKER in found.warnings[0]


def test_a_tracker_may_name_an_older_one(two, tmp_path, single):
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    (root / folders.TRACKER).write_text("3")
    found = newest(root, single)
    assert found.iteration == 3
    assert "iter_0000005, which is newer, is left out" in found.warnings[0]


def test_all_damaged(two, tmp_path, single):
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    for step in (3, 5):
        (folders.iteration_folder(root, step) / ".metadata").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"iter_0000005 .*\.metadata has 0 bytes.*iter_0000003"
    ):
        newest(root, single)


def test_what_a_save_left_half_written_is_not_loaded(two, tmp_path, single):
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    shutil.copytree(root / "iter_0000005", root / "iter_0000007.partial")
    assert newest(root, single) == (5, ())


def test_marks_name_every_file(two):
    from megatron_kvshare.checkpoint.manifest import read_manifest

    newest_folder = folders.iteration_folder(two, 5)
    names = {path.name for path in newest_folder.iterdir()} - {"kvshare.json"}
    assert set(read_manifest(newest_folder).files) == names
