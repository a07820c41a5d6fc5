"""Names under which results are written before they get their own: no two writers share one,
so what a killed one left is never part of what another writes; and what puts them on the disk."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path

PARTIAL = ".partial"
_DIGITS = 12


def aside(target: Path) -> Path:
    """A new name beside ``target``, for its content while it is not complete."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex[:_DIGITS]}{PARTIAL}")


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what was written aside in ``folder`` for targets whose names match the expression
    ``name``, as far as that can be done; for their owner, while it writes nothing."""
    pattern = re.compile(rf"{name}(\.[0-9a-f]{{{_DIGITS}}})?{re.escape(PARTIAL)}")
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if pattern.fullmatch(path.name):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, as far as that can be done."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """Make sure that the content of files, and the names in folders, are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
