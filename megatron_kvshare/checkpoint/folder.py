"""Where checkpoints lie: ``iter_0000100`` folders beside a tracker file, as in Megatron."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.ownership.aside import aside, remove, remove_leftovers, sync

TRACKER = "latest_checkpointed_iteration.txt"
OLD = ".old"
"""Ending of a checkpoint while another one takes its name."""


def iteration_folder(root: Path, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return root / f"iter_{iteration:07d}"


def latest_iteration(root: Path) -> int | None:
    """The last complete checkpoint in ``root``, or None when there is none.

    Raises:
        CheckpointError: the tracker is damaged or names a checkpoint that is gone.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,18}", text):
        fix = f"write the number of the newest iter_* folder into {tracker}"
        raise CheckpointError(Fault(str(tracker), text, "it must hold one whole number", fix))
    if not iteration_folder(root, int(text)).is_dir():
        rule = f"the folder {iteration_folder(root, int(text)).name} it names does not exist"
        fix = f"write the number of an existing iter_* folder into {tracker}"
        raise CheckpointError(Fault(str(tracker), text, rule, fix))
    return int(text)


def is_file_name(name: str) -> bool:
    """Whether it names something in a folder, and nothing else anywhere."""
    return name not in ("", ".", "..") and not any(each in name for each in "/\\\0")


def file_inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a checkpoint, where what is read says the name.

    Raises:
        ValueError: it would be a file outside the folder, by its path or through a link.
    """
    if not is_file_name(name):
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise ValueError(f"{name} is a link that leads out of the folder")
    return path


def begin(target: Path) -> Path:
    """Make and return the empty folder in which ``target`` is written aside; what killed runs were
    writing goes."""
    remove_leftovers(target.parent, r"iter_\d+")
    partial = aside(target)
    partial.mkdir(parents=True)
    return partial


def repair(root: Path) -> None:
    """Give back its name to a checkpoint that was being replaced when the process was killed, as
    far as that can be done; for the owner of ``root``."""
    for old in root.glob(f"iter_*{OLD}"):
        target = old.with_name(old.name.removesuffix(OLD))
        with contextlib.suppress(OSError):
            if os.path.lexists(target):
                remove(old)
            else:
                old.rename(target)


class Candidates(NamedTuple):
    """Iterations that may be loaded, the best first; ``complaint``: what is wrong, or strange, with
    the tracker."""

    iterations: list[int]
    complaint: str | None = None


def candidates(root: Path) -> Candidates:
    """What the tracker names, then older ones.

    Where the tracker cannot be used (missing or cut off, or it names a folder that is gone) all
    there are, newest first: a folder gets its name when it is complete.

    Raises:
        CheckpointError: the folder, or something in it, cannot be looked at.
    """
    try:
        return _candidates(root)
    except OSError as error:
        rule = "whether there are checkpoints in it cannot be seen"
        fix = "see that its disk is there and that you may read it"
        raise CheckpointError(Fault(str(root), str(error), rule, fix)) from error


def _candidates(root: Path) -> Candidates:
    there = _iterations(root)
    try:
        named = latest_iteration(root)
    except CheckpointError as error:
        return Candidates(there, str(error.faults[0]))
    if named is None:
        return Candidates(there, f"{root / TRACKER} is missing" if there else None)
    return Candidates([each for each in there if each <= named], _passed_over(root, named, there))


def _iterations(root: Path) -> list[int]:
    """Those of folders with the name of a checkpoint, the newest first."""
    names = os.listdir(root) if root.is_dir() else []
    found = (re.fullmatch("iter_([0-9]{1,18})", name) for name in names)
    return sorted(
        (int(name[1]) for name in found if name and (root / name[0]).is_dir()), reverse=True
    )


def passed_over(root: Path, named: int) -> str | None:
    """What to say where the tracker names an older checkpoint than there is: people go back that
    way, and damage looks the same."""
    return _passed_over(root, named, _iterations(root))


def _passed_over(root: Path, named: int, there: Sequence[int]) -> str | None:
    newest = max(there, default=named)
    if newest <= named:
        return None
    name = iteration_folder(root, newest).name
    return f"{root / TRACKER} says {named}, so {name}, which is newer, is left out"


def flush(folder: Path) -> None:
    """Make sure that the files of ``folder``, and their names, are on the disk."""
    sync(*folder.iterdir(), folder)


def publish(partial: Path, target: Path, iteration: int) -> None:
    """Rename the complete ``partial`` to ``target``, then point the tracker at it. What needs room
    on the disk comes first: where there is none, nothing has changed."""
    tracker = target.parent / TRACKER
    remove_leftovers(target.parent, re.escape(TRACKER))
    draft = aside(tracker)
    try:
        draft.write_text(f"{iteration}\n", encoding="utf-8")
        sync(draft)
        _replace(partial, target)
        sync(target.parent)
        os.replace(draft, tracker)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync(target.parent)


def _replace(partial: Path, target: Path) -> None:
    """Give ``partial`` the name of ``target``, which may be there already."""
    old = target.with_name(target.name + OLD)
    if os.path.lexists(target):
        remove(old)
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise
    remove(old)
