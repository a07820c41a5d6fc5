"""The folder where megatron-core keeps indices of samples: whole files, or none.

An index says which tokens every sample holds. megatron-core writes it in place and believes what it
finds; here it appears complete, with the SHA-256 of its files beside, and is made again where these
do not agree.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

_DESCRIPTION, _SUMS = "-description.txt", "-sha256.json"


def fill(build: Callable[[str], object], cache: Path, data: Collection[str]) -> None:
    """Run ``build`` on a private copy of the cache, then move what it added to the cache.

    A reader, or a restart after a kill, could meet half of what is written in place.

    Args:
        build: makes what is missing in the folder it is given.
        cache: the folder.
        data: SHA-256 of the data whose indices are needed; others are left alone.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix=".building-") as private:
        for base in _bases(cache, data):
            for file in cache.glob(f"{base}-*") if _is_whole(cache, base) else ():
                Path(private, file.name).symlink_to(file.resolve())
        build(private)
        added = [file for file in Path(private).iterdir() if not file.is_symlink()]
        for base in {_base(file) for file in added if file.name.endswith(_DESCRIPTION)}:
            sums = {file.name: _sha256(file) for file in added if _base(file) == base}
            marks = Path(private, base + _SUMS)
            marks.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
            added.append(marks)
        # The description marks a complete index, so it goes last.
        for file in sorted(added, key=lambda file: file.name.endswith(_DESCRIPTION)):
            os.replace(file, cache / file.name)


def is_whole(cache: Path, data: str) -> bool:
    """Whether all indices of the data with this SHA-256 are as they were written."""
    return all(_is_whole(cache, base) for base in _bases(cache, [data]))


def _bases(cache: Path, data: Collection[str]) -> Iterator[str]:
    for file in cache.glob("*" + _DESCRIPTION):
        text = file.read_text(encoding="utf-8", errors="replace")
        if any(sha256 in text for sha256 in data):
            yield _base(file)


def _base(file: Path) -> str:
    """The name that the files of one index begin with; none of their endings has a hyphen."""
    return file.name.rpartition("-")[0]


def _is_whole(cache: Path, base: str) -> bool:
    try:
        sums = json.loads((cache / (base + _SUMS)).read_text(encoding="utf-8"))
        return bool(sums) and all(_sha256(cache / name) == sum for name, sum in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
