"""Where checkpoints lie (L4): ``iter_0000100`` folders beside a tracker file, as in Megatron."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.errors import CheckpointError, Fault

TRACKER = "latest_checkpointed_iteration.txt"


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
    if not text.isdecimal():
        fix = f"write the number of the newest iter_* folder into {tracker}"
        raise CheckpointError(Fault(str(tracker), text, "it must hold one whole number", fix))
    if not iteration_folder(root, int(text)).is_dir():
        rule = f"the folder {iteration_folder(root, int(text)).name} it names does not exist"
        fix = f"write the number of an existing iter_* folder into {tracker}"
        raise CheckpointError(Fault(str(tracker), text, rule, fix))
    return int(text)


def file_inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a checkpoint, where what is read says the name.

    Raises:
        ValueError: it would be a file outside the folder, by its path or through a link.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise ValueError(f"{name} is a link that leads out of the folder")
    return path


def begin(target: Path) -> Path:
    """Make and return the empty folder in which ``target`` is written aside."""
    discard(target)
    aside = _aside(target)
    aside.mkdir(parents=True)
    return aside


def discard(target: Path) -> None:
    """Remove what was written aside for ``target``, as far as that can be done."""
    shutil.rmtree(_aside(target), ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


class Candidates(NamedTuple):
    """Iterations that may be loaded, the best first; ``complaint``: what is wrong with the
    tracker."""

    iterations: list[int]
    complaint: str | None = None


def candidates(root: Path) -> Candidates:
    """What the tracker names, then older ones.

    Where the tracker cannot be used (missing or cut off, or it names a folder that is gone) all
    there are, newest first: a folder gets its name when it is complete.
    """
    numbers = [path.name[5:] for path in root.glob("iter_*") if path.is_dir()]
    there = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    try:
        named = latest_iteration(root)
    except CheckpointError as error:
        return Candidates(there, str(error.faults[0]))
    if named is None:
        return Candidates(there, f"{root / TRACKER} is missing" if there else None)
    return Candidates([number for number in there if number <= named])


def flush(folder: Path) -> None:
    """Make sure that the files of ``folder``, and their names, are on the disk."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(aside: Path, target: Path, iteration: int) -> None:
    """Rename the complete ``aside`` to ``target``, then point the tracker at it."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    tracker = target.parent / TRACKER
    draft = tracker.with_suffix(".partial")
    try:
        draft.write_text(f"{iteration}\n", encoding="utf-8")
        flush(target.parent)
        os.replace(draft, tracker)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    flush(target.parent)
