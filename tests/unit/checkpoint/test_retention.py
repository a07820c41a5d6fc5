"""Older checkpoints go when a newer one is complete, and nothing else does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint.folder import Keep, candidates, iteration_folder, remove_superseded
from megatron_kvshare.checkpoint.manifest import MANIFEST, Manifest, Progress


@pytest.mark.parametrize(
    ("keep", "going"),
    [
        (Keep(), []),
        (Keep(every=4), []),
        (Keep(1), [2, 4, 6, 8]),
        (Keep(3), [2, 4]),
        (Keep(9), []),
        (Keep(1, every=4), [2, 6]),
        (Keep(2, every=4), [2, 6]),
        (Keep(2, every=3), [2, 4]),
    ],
    ids=str,
)
def test_what_goes(keep, going):
    """The newest ones stay, also where they are multiples; one that was not replaced stays."""
    assert keep.superseded([10, 8, 2, 6, 4, 12], written=10) == going


def checkpoint(root: Path, step: int) -> Path:
    folder = iteration_folder(root, step)
    folder.mkdir()
    Manifest({}, Progress(step), 1, 1, False).write(folder)
    (folder / "__0_0.distcp").write_text("tensors")
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    return tmp_path


def test_folders_of_others_stay(root, tmp_path_factory):
    elsewhere = checkpoint(tmp_path_factory.mktemp("elsewhere"), 1)
    (root / "iter_0000001").symlink_to(elsewhere)
    shutil.copytree(root / "iter_0000002", root / "iter_0000003")  # by hand: another step inside
    (root / "iter_0000005").mkdir()
    shutil.copytree(root / "iter_0000002", root / "iter_best")
    (root / "iter_0000000").write_text("a file")
    (root / "notes").mkdir()
    before = {path.name for path in root.iterdir()}
    assert remove_superseded(root, 6, Keep(1)) == []
    assert before - {path.name for path in root.iterdir()} == {"iter_0000002", "iter_0000004"}
    assert (elsewhere / MANIFEST).is_file()


def test_nothing_goes_unless_asked(root):
    assert remove_superseded(root, 6, Keep()) == []
    assert len(list(root.iterdir())) == 3


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_sound(root, monkeypatch):
    """And the next one completes it."""

    def cut_off(folder: Path) -> None:
        (folder / "__0_0.distcp").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            remove_superseded(root, 6, Keep(1))
    assert candidates(root).iterations == [6]
    assert len(list(root.iterdir())) == 3
    assert remove_superseded(root, 6, Keep(1)) == []
    assert [path.name for path in root.iterdir()] == ["iter_0000006"]


def test_what_cannot_be_removed_is_told(root, monkeypatch):
    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", refused)
    problems = remove_superseded(root, 6, Keep(2))
    assert len(problems) == 1
    assert "iter_0000002.deleted cannot be removed: Permission denied" in problems[0]
