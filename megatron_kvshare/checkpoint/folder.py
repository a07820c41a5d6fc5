"""Where checkpoints lie (L4): ``iter_0000100`` folders beside a tracker file, as in Megatron."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

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
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdecimal():
        fix = f"write the number of the newest iter_* folder into {tracker}"
        raise CheckpointError(Fault(str(tracker), text, "it must hold one whole number", fix))
    if not iteration_folder(root, int(text)).is_dir():
        rule = f"the folder {iteration_folder(root, int(text)).name} it names does not exist"
        fix = f"write the number of an existing iter_* folder into {tracker}"
        raise CheckpointError(Fault(str(tracker), text, rule, fix))
    return int(text)


def begin(target: Path) -> Path:
    """Make and return the empty folder in which ``target`` is written aside."""
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def publish(aside: Path, target: Path, iteration: int) -> None:
    """Rename the complete ``aside`` to ``target``, then point the tracker at it."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    tracker = target.parent / TRACKER
    draft = tracker.with_suffix(".partial")
    draft.write_text(f"{iteration}\n", encoding="utf-8")
    os.replace(draft, tracker)
