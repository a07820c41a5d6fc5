"""Which checkpoints stay when a newer one has been written, and how the others go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.checkpoint.folder import iteration_folder
from megatron_kvshare.checkpoint.manifest import read_manifest
from megatron_kvshare.errors import CheckpointError

_GOING = ".deleted"


class Keep(NamedTuple):
    """``last``: how many of the newest stay, None: all; ``every``: multiples of it stay as well."""

    last: int | None = None
    every: int | None = None

    def superseded(self, iterations: list[int], written: int) -> list[int]:
        """Those of ``iterations`` that go now that ``written`` is complete, oldest first.

        Newer ones than ``written`` are left alone: a run that went back to an older checkpoint has
        not replaced them yet.
        """
        if self.last is None:
            return []
        past = sorted(each for each in iterations if each < written)
        stay = past[-(self.last - 1) :] if self.last > 1 else []
        return [
            each for each in past if each not in stay and (self.every is None or each % self.every)
        ]


KEEP_ALL = Keep()


def remove_superseded(root: Path, written: int, keep: Keep) -> list[str]:
    """Remove what ``keep`` lets go; returns what could not be removed, and why.

    A folder loses its name before its files go: half a checkpoint never looks like one. What an
    earlier removal left, because the machine stopped, goes too.
    """
    if keep.last is None:
        return []
    found = dict(_checkpoints(root))
    going = list(root.glob(f"iter_*{_GOING}"))
    problems = []
    for iteration in keep.superseded(list(found), written):
        folder = found[iteration]
        try:
            going.append(folder.rename(folder.with_name(folder.name + _GOING)))
        except OSError as error:
            problems.append(f"{folder} cannot be removed: {error.strerror}")
    for folder in going:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            problems.append(f"{folder} cannot be removed: {error.strerror}")
    return problems


def _checkpoints(root: Path) -> Iterator[tuple[int, Path]]:
    """The folders that are certainly checkpoints of this program, by iteration."""
    for folder in root.glob("iter_*"):
        number = re.fullmatch(r"iter_(\d+)", folder.name)
        if number is None or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            step = read_manifest(folder).progress.step
        except CheckpointError:
            continue
        if folder == iteration_folder(root, step):
            yield step, folder
