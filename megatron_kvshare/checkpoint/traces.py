"""What tells that there were checkpoints, in a folder where none can be found: a run must not
start over because a disk is not there."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_kvshare.checkpoint.folder import OLD, TRACKER
from megatron_kvshare.checkpoint.manifest import MANIFEST
from megatron_kvshare.ownership.aside import PARTIAL

_SHOWN = 5


def traces(root: Path) -> list[str]:
    """A line for each. What a killed run was writing aside is none: it was not complete.

    Raises:
        OSError: the folder cannot be read.
    """
    if not root.is_dir():
        return []
    found = []
    for name in sorted(os.listdir(root)):
        path = root / name
        if name == TRACKER:
            found.append(f"{path} {_content(path)}")
        elif name.startswith("iter_") and not name.endswith(PARTIAL):
            found.append(f"{path} {_state(path)}")
        elif not name.endswith((PARTIAL, OLD)) and os.path.lexists(path / MANIFEST):
            found.append(f"{path} is a checkpoint under another name")
    return found if len(found) <= _SHOWN else [*found[:_SHOWN], f"{len(found) - _SHOWN} more"]


def _content(tracker: Path) -> str:
    try:
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"names step {text[:20]}"


def _state(path: Path) -> str:
    if path.is_symlink() and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which is not there"
    return "is no folder of a checkpoint" if path.is_dir() else "is no folder"
