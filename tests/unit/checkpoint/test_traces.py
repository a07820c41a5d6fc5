"""`--resume auto` does not start over where there were checkpoints; where there were none it goes
on by itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.load import chosen, newest_sound
from megatron_kvshare.checkpoint.manifest import MANIFEST, Manifest, Progress
from megatron_kvshare.config import CheckpointConfig, LogConfig, PretrainConfig
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.train.sinks import promised_checkpoints
from tests.unit.checkpoint.test_manifest import identity_of


def write(root: Path, step: int) -> Path:
    target = folders.iteration_folder(root, step)
    aside = folders.begin(target)
    Manifest(identity_of(), Progress(step, step, step), 1, 1, True).write(aside)
    folders.publish(aside, target, step)
    return target


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run's folder with checkpoints of the steps 20 and 40."""
    save = tmp_path / "save"
    for step in (20, 40):
        write(save, step)
    return save


def lose(root: Path, how: str) -> None:
    """What happens to the checkpoints of `root`."""
    tracker = root / folders.TRACKER
    for path in sorted(root.glob("iter_*")):
        if how == "behind links":
            path.rename(root.parent / path.name)
            path.symlink_to(root.parent / "not mounted" / path.name)
        elif how == "renamed":
            path.rename(root / f"old-{path.name}")
        elif how == "given an ending":
            path.rename(f"{path}.bak")
        elif how == "files":
            shutil.rmtree(path)
            path.write_text("an archive")
        elif how == "half removed":
            path.rename(f"{path}.deleted")
        else:
            shutil.rmtree(path)
    if how != "removed, the tracker stays":
        tracker.unlink()
    if how == "all behind links":
        tracker.symlink_to(root.parent / "not mounted" / tracker.name)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("removed, the tracker stays", "names step 40"),
        ("all behind links", "cannot be read"),
        ("behind links", "iter_0000040 is a link to"),
        ("renamed", "old-iter_0000040 is a checkpoint under another name"),
        ("given an ending", "iter_0000040.bak"),
        ("files", "iter_0000040 is no folder"),
        ("half removed", "iter_0000040.deleted"),
    ],
)
@pytest.mark.parametrize("load", [None, "pretrained"])
def test_checkpoints_that_are_gone(root: Path, single, how: str, told: str, load: str) -> None:
    lose(root, how)
    settings = CheckpointConfig(save=str(root), resume="auto", load=load)
    with pytest.raises(CheckpointError) as refused:
        chosen(settings, single)
    text = str(refused.value)
    assert told in text and "bring the checkpoints back" in text and "remove what" in text
    meant = CheckpointConfig(save=str(root), load=load)
    assert chosen(meant, single) is meant
    for path in root.iterdir():  # what the message tells to do
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert chosen(settings, single) is settings


def empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def killed_in_the_first_save(root: Path) -> None:
    empty(root)
    Manifest(identity_of(), Progress(20, 20, 20), 1, 1, True).write(
        folders.begin(folders.iteration_folder(root, 20))
    )


def other_files(root: Path) -> None:
    empty(root)
    (root / "run.lock.1").touch()
    (root / "skipped_batches.jsonl").touch()
    (root / "tensorboard").mkdir()


@pytest.mark.parametrize("how", [shutil.rmtree, empty, killed_in_the_first_save, other_files])
def test_a_first_start(root: Path, single, how: Callable[[Path], None]) -> None:
    how(root)
    settings = CheckpointConfig(save=str(root), resume="auto")
    assert chosen(settings, single) is settings


@pytest.mark.parametrize(
    ("last", "every", "flags", "promised"),
    [
        (19, 20, {}, False),
        (20, 20, {}, False),  # killed before the save, which comes after the line
        (21, 20, {}, True),
        (40, 20, {"async_save": True}, False),  # killed while the first save was being written
        (41, 20, {"async_save": True}, True),
        (1000, None, {}, False),
    ],
)
def test_metrics_promise_checkpoints(
    tmp_path: Path, single, last: int, every: int | None, flags: dict, promised: bool
) -> None:
    """The folder is the empty one below a disk that is not mounted, say."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, last + 1)]
    metrics.write_text("".join(lines) + '{"step": 99999, "lo')
    settings = CheckpointConfig(
        save=str(tmp_path / "save"), resume="auto", save_interval=every, **flags
    )
    config = PretrainConfig(checkpoint=settings, log=LogConfig(metrics_file=str(metrics)))
    if not promised:
        assert chosen(settings, single, lambda: promised_checkpoints(config)) is settings
        return
    with pytest.raises(CheckpointError, match=rf"metrics.jsonl goes up to step {last}"):
        chosen(settings, single, lambda: promised_checkpoints(config))
    metrics.unlink()
    assert chosen(settings, single, lambda: promised_checkpoints(config)) is settings


def test_a_checkpoint_that_was_being_replaced_has_its_name_again(root: Path) -> None:
    target, folder = folders.iteration_folder(root, 40), folders.iteration_folder(root, 20)
    target.rename(f"{target}{folders.OLD}")
    shutil.copytree(folder, f"{folder}{folders.OLD}")
    folders.repair(root)
    assert folders.candidates(root).iterations == [40, 20]
    assert not list(root.glob(f"*{folders.OLD}"))


def test_a_folder_that_cannot_be_looked_at(
    root: Path, single, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system's answer is given here."""

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    settings = CheckpointConfig(save=str(root), resume="auto")
    with pytest.raises(CheckpointError, match="Permission denied"):
        chosen(settings, single)


def test_a_folder_to_load_tells_what_is_wrong_with_it(root: Path, single) -> None:
    lose(root, "removed, the tracker stays")
    with pytest.raises(CheckpointError, match="iter_0000040 it names does not exist"):
        newest_sound(CheckpointConfig(load=str(root)), single)


def test_a_new_checkpoint_replaces_a_link_that_leads_nowhere(root: Path) -> None:
    lose(root, "behind links")
    write(root, 40)
    assert folders.candidates(root).iterations == [40]
    assert (root / "iter_0000040" / MANIFEST).is_file()
