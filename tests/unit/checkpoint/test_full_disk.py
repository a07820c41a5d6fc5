"""A disk that fills up at any point of a save: the older checkpoint stays, nothing half written."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint.folder import TRACKER
from megatron_kvshare.checkpoint.load import newest_sound
from megatron_kvshare.checkpoint.manifest import Manifest, Progress
from megatron_kvshare.checkpoint.save import save_checkpoint
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.sharing.patterns import build_map
from tests.disks import small_disk
from tests.huggingface import TINY, model_spec

TOP = build_map(4, "sandwich-top", 2)
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with small_disk(tmp_path, 4 * 2**20):
        yield tmp_path


def test_at_any_point_of_a_save(disk, single):
    """Filled up but for one page more each time, until the save fits."""
    model = TINY.model(TOP, single)
    about = model_spec(TOP).identity
    root = disk / "save"
    save_checkpoint(root, Manifest(about, Progress(1), 1, 1, False), [model], None, single)
    pages = sum(-(-path.stat().st_size // PAGE) for path in root.glob("iter_0000001/*"))
    messages = []
    for free in range(0, pages + 8):
        fill(disk, free)
        try:
            manifest = Manifest(about, Progress(2), 1, 1, False)
            save_checkpoint(root, manifest, [model], None, single)
            break
        except CheckpointError as error:
            messages.append(str(error))
        assert not list(disk.rglob("*.partial"))
        assert (root / TRACKER).read_text() == "1\n"
        assert newest_sound(CheckpointConfig(load=str(root)), single) == (1, ())
    assert pages <= len(messages) < pages + 8
    assert all("No space left on device" in message for message in messages)
    assert newest_sound(CheckpointConfig(load=str(root)), single) == (2, ())


def test_one_that_cannot_be_written(disk, single):
    model = TINY.model(TOP, single)
    root = disk / "save"
    manifest = Manifest(model_spec(TOP).identity, Progress(1), 1, 1, False)
    save_checkpoint(root, manifest, [model], None, single)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        save_checkpoint(root, replace(manifest, progress=Progress(2)), [model], None, single)
    assert newest_sound(CheckpointConfig(load=str(root)), single) == (1, ())


def fill(disk: Path, free: int) -> None:
    """Write until `free` pages are left."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            file.truncate(file.tell() - free * PAGE)
