"""Finished work of a run that is not over, on the disk: a killed run goes on from there.

``PREFIX.unfinished/`` holds for every key the tokens (``KEY.bin``) and the length of each document
(``KEY.lengths``, int32) so far, and ``progress.json``: how much of both is finished, and where the
input goes on. What a killed run wrote behind that is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy

from megatron_kvshare.data.documents import Position
from megatron_kvshare.data.encoding import Encoded, InnerEnds, Skipped
from megatron_kvshare.data.publish import INDEX, NOTES, TOKENS
from megatron_kvshare.ownership.aside import aside, remove, remove_leftovers, sync

_PROGRESS = "progress.json"
_LENGTHS = ".lengths"


@dataclass
class KeyCounts:
    """What is written under one key."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Progress:
    """How far a run has come. ``job`` names what it does: another one cannot go on from here."""

    job: str
    position: Position = field(default_factory=Position)
    keys: list[KeyCounts] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    inner_ends: InnerEnds = field(default_factory=InnerEnds)
    is_complete: bool = False
    """All files are written; some may have their names."""

    def add(self, encoded: Encoded) -> None:
        """Count a batch."""
        self.position = encoded.end
        self.skipped.add(encoded.skipped)
        self.inner_ends.add(encoded.inner_ends)
        for counts, key in zip(self.keys, encoded.keys, strict=True):
            counts.documents += key.lengths.size
            counts.tokens += key.ids.size
            counts.text_bytes += key.text_bytes


class Unfinished:
    """The folder of a run's finished work; for its owner.

    Args:
        prefix: where the results will lie.
        keys: names of the files of each key.
        job: what the run does; work of another job is removed.
        width: bytes of a token id.
    """

    def __init__(self, prefix: str, keys: Sequence[str], job: str, width: int) -> None:
        self.folder = Path(prefix + ".unfinished")
        self._keys, self._width = list(keys), width
        self._files: list[tuple[IO[bytes], IO[bytes]]] = []
        found = self._found(job)
        self.is_resumed = found is not None
        self.replaces_other = found is None and self.folder.exists()
        self.progress = found or Progress(job, keys=[KeyCounts() for _ in keys])
        self.is_committed = self.is_resumed
        if found is None:
            remove(self.folder)
            self.folder.mkdir(parents=True)
        remove_leftovers(self.folder, _PROGRESS)

    def path(self, number: int, suffix: str) -> Path:
        """A file of a key in the folder."""
        return self.folder / f"{self._keys[number]}{suffix}"

    def open(self) -> None:
        """Get ready to write behind what is finished."""
        for number in range(len(self._keys)):
            tokens, lengths = (self.path(number, suffix) for suffix in (TOKENS, _LENGTHS))
            for path, size in zip((tokens, lengths), self._sizes(number), strict=True):
                path.touch()
                os.truncate(path, size)
            self._files.append((tokens.open("ab"), lengths.open("ab")))

    def write(self, encoded: Encoded) -> None:
        """Write a batch behind the others."""
        for (tokens, lengths), key in zip(self._files, encoded.keys, strict=True):
            tokens.write(key.ids.data)
            lengths.write(key.lengths.data)
        self.progress.add(encoded)

    def commit(self) -> None:
        """What has been written so far is finished, once this returns."""
        for pair in self._files:
            for file in pair:
                file.flush()
                os.fsync(file.fileno())
        target = self.folder / _PROGRESS
        partial = aside(target)
        partial.write_text(json.dumps(asdict(self.progress), indent=1) + "\n", encoding="utf-8")
        sync(partial)
        os.replace(partial, target)
        sync(self.folder)
        self.is_committed = True

    def lengths(self, number: int) -> numpy.ndarray:
        """The length of every document of a key, mapped from the disk."""
        path = self.path(number, _LENGTHS)
        if not path.stat().st_size:
            return numpy.empty(0, dtype=numpy.int32)
        return numpy.memmap(path, dtype=numpy.int32, mode="r")

    def results(self, number: int) -> dict[str, Path]:
        """By suffix, the files of a key that have no name of their own yet."""
        files = {suffix: self.path(number, suffix) for suffix in (TOKENS, INDEX, NOTES)}
        return {suffix: path for suffix, path in files.items() if path.exists()}

    def close(self) -> None:
        """Close the files; the folder goes where nothing in it is finished."""
        for pair in self._files:
            for file in pair:
                file.close()
        self._files = []
        if not self.is_committed:
            self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        remove(self.folder)

    def _sizes(self, number: int) -> tuple[int, int]:
        counts = self.progress.keys[number]
        return counts.tokens * self._width, counts.documents * 4

    def _found(self, job: str) -> Progress | None:
        """The progress of the same job, if its files are as large as it says."""
        try:
            progress = _parsed(json.loads((self.folder / _PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if progress.job != job or len(progress.keys) != len(self._keys):
            return None
        if progress.is_complete:
            return progress
        self.progress = progress
        for number in range(len(self._keys)):
            for suffix, size in zip((TOKENS, _LENGTHS), self._sizes(number), strict=True):
                path = self.path(number, suffix)
                if not path.is_file() or path.stat().st_size < size:
                    return None
        return progress


def _parsed(fields: Mapping[str, Any]) -> Progress:
    return Progress(
        job=fields["job"],
        position=Position(*fields["position"]),
        keys=[KeyCounts(**counts) for counts in fields["keys"]],
        skipped=Skipped(**fields["skipped"]),
        inner_ends=InnerEnds(**fields["inner_ends"]),
        is_complete=fields["is_complete"],
    )
