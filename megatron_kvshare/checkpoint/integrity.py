"""Whether the files of a checkpoint are those that were written.

Every file is marked with its size and SHA-256 in the manifest, and the manifest with its own. The
ranks share the reading, at saving and at loading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_kvshare.checkpoint.manifest import file_inside
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects

Marks = Mapping[str, Mapping[str, Any]]
"""File name in the folder -> ``bytes`` and ``sha256``."""


def mark(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def mark_files(
    folder: Path, state: ParallelState, group: dist.ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """The marks of all files in ``folder``; all ranks of ``group`` call this, each reads its share.

    Raises:
        OSError: on all ranks, if one cannot read its share.
    """
    mine: dict[str, dict[str, Any]] = {}
    failure = None
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        mine = {name: mark(folder / name) for name in names[state.rank :: state.world_size]}
    except OSError as error:
        failure = str(error)
    everyone = gather_objects((mine, failure), group)
    for _, reason in everyone:
        if reason is not None:
            raise OSError(reason)
    return {name: each for part, _ in everyone for name, each in part.items()}


def problems_of_all(folder: Path, marks: Marks, state: ParallelState) -> list[str]:
    """:func:`problems` of all files; all ranks call this, each reads its share."""
    names = sorted(marks)[state.rank :: state.world_size]
    mine = problems(folder, {name: marks[name] for name in names})
    return [each for part in gather_objects(mine) for each in part]


def problems(folder: Path, marks: Marks) -> list[str]:
    """What is wrong with the files that were marked, a line for each."""
    found = []
    for name, wanted in marks.items():
        try:
            path = file_inside(folder, name)
            size = path.stat().st_size
            if size != wanted["bytes"]:
                found.append(f"{name} has {size:,} bytes of {wanted['bytes']:,}")
            elif mark(path)["sha256"] != wanted["sha256"]:
                found.append(f"{name} is not what was written (SHA-256)")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
        except ValueError as error:
            found.append(str(error))
    return found
