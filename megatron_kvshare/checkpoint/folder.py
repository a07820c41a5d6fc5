"""Where checkpoints lie: ``iter_0000100`` folders beside a tracker file, as in Megatron; what
DeepSpeed has written is called ``global_step100``, and the file ``latest`` names it too.

Which there are, how one gets its name, which stay when a newer one has been written, and what tells
that there were some where none can be found. No torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.checkpoint.manifest import MANIFEST, Layout, read_manifest
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.ownership.aside import PARTIAL, aside, remove, remove_leftovers, sync

TRACKER = "latest_checkpointed_iteration.txt"
DEEPSPEED_TRACKER = "latest"
_NAME = re.compile("(?:iter_|global_step)([0-9]{1,18})")
OLD = ".old"
"""Ending of a checkpoint while another one takes its name."""
_GOING = ".deleted"
"""Ending of one that is being removed."""
_SHOWN = 5
"""Traces named in one message; the others are counted."""


def iteration_folder(root: Path, iteration: int, layout: Layout | None = None) -> Path:
    """The folder of one checkpoint; of either layout, as it is there, where none is named."""
    native, deepspeed = root / f"iter_{iteration:07d}", root / f"global_step{iteration}"
    if layout is None:
        layout = "deepspeed" if deepspeed.is_dir() and not native.is_dir() else "native"
    return deepspeed if layout == "deepspeed" else native


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


def begin(target: Path) -> Path:
    """Make and return the empty folder in which ``target`` is written aside; what killed runs were
    writing goes."""
    remove_leftovers(target.parent, _NAME.pattern)
    partial = aside(target)
    partial.mkdir(parents=True)
    return partial


def repair(root: Path) -> None:
    """Give back its name to a checkpoint that was being replaced when the process was killed, as
    far as that can be done; for the owner of ``root``."""
    for old in _ending_in(OLD, root):
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


def candidates(root: Path, step: int | None = None) -> Candidates:
    """What the tracker names, then older ones; or the one of ``step`` alone.

    Where the tracker cannot be used (missing or cut off, or it names a folder that is gone) all
    there are, newest first: a folder gets its name when it is complete.

    Raises:
        CheckpointError: the folder, or something in it, cannot be looked at, or has no such step.
    """
    try:
        return _candidates(root) if step is None else _only(step, root)
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


def _only(step: int, root: Path) -> Candidates:
    there = _iterations(root)
    if step not in there:
        shown = ", ".join(map(str, there[:_SHOWN])) or "none"
        rule = f"{root} has no checkpoint of that step; the newest there are: {shown}"
        raise CheckpointError(Fault("--ckpt-step", step, rule, "name one that is there"))
    return Candidates([step])


def _iterations(root: Path) -> list[int]:
    """Those of folders with the name of a checkpoint, the newest first."""
    names = os.listdir(root) if root.is_dir() else []
    found = (_NAME.fullmatch(name) for name in names)
    return sorted({int(name[1]) for name in found if name and (root / name[0]).is_dir()})[::-1]


def _ending_in(ending: str, root: Path) -> list[Path]:
    """What is left of checkpoints that had another name."""
    paths = root.glob(f"*{ending}")
    return [path for path in paths if _NAME.fullmatch(path.name.removesuffix(ending))]


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
    root, is_native = target.parent, target == iteration_folder(target.parent, iteration, "native")
    texts = {TRACKER: f"{iteration}\n", DEEPSPEED_TRACKER: "" if is_native else target.name}
    drafts = {}
    try:
        for name, text in texts.items():
            remove_leftovers(root, re.escape(name))
            if text:
                drafts[name] = aside(root / name)
                drafts[name].write_text(text, encoding="utf-8")
                sync(drafts[name])
        _replace(partial, target)
        sync(root)
        for name, draft in drafts.items():
            os.replace(draft, root / name)
    except OSError:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        raise
    if is_native:  # or DeepSpeed's tools would take an older checkpoint for the newest
        (root / DEEPSPEED_TRACKER).unlink(missing_ok=True)
    other = iteration_folder(root, iteration, "deepspeed" if is_native else "native")
    if other.is_dir() and not other.is_symlink():
        remove(other)
    sync(root)


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


# Which stay when a newer one has been written -----------------------------------------------------


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
    going = _ending_in(_GOING, root)
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
    for folder in root.iterdir():
        if not _NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            continue
        step = manifest.progress.step
        if folder == iteration_folder(root, step, manifest.layout):
            yield step, folder


# Traces of checkpoints that cannot be found -------------------------------------------------------


def traces(root: Path) -> list[str]:
    """What tells that there were checkpoints in ``root``, a line for each: a run must not start
    over because a disk is not there.

    What a killed run was writing aside is none: it was not complete.

    Raises:
        OSError: the folder cannot be read.
    """
    if not root.is_dir():
        return []
    found = []
    for name in sorted(os.listdir(root)):
        path = root / name
        if name in (TRACKER, DEEPSPEED_TRACKER):
            found.append(f"{path} {_tracker_text(path)}")
        elif name.startswith(("iter_", "global_step")) and not name.endswith(PARTIAL):
            found.append(f"{path} {_folder_state(path)}")
        elif not name.endswith((PARTIAL, OLD)) and os.path.lexists(path / MANIFEST):
            found.append(f"{path} is a checkpoint under another name")
    return found if len(found) <= _SHOWN else [*found[:_SHOWN], f"{len(found) - _SHOWN} more"]


def _tracker_text(tracker: Path) -> str:
    try:
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"names step {text[:20]}"


def _folder_state(path: Path) -> str:
    if path.is_symlink() and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which is not there"
    return "is no folder of a checkpoint" if path.is_dir() else "is no folder"
