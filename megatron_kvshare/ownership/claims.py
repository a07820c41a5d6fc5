"""Claims on a place: files ``NAME.lock.1``, ``NAME.lock.2``, ... of which the highest owns.

No claim is ever changed or replaced. It is written under a name of its own and published by a hard
link, which exactly one of several processes can make, on network file systems too. To take a place
over is to publish the next number; only then the lower ones go.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_kvshare.ownership.process import Process

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_DRAFT = ".draft"


@dataclass(frozen=True)
class Claim:
    """Who claims a place; the owner touches the file every ``interval`` seconds. ``process`` None:
    the file says nothing that can be understood."""

    token: str
    process: Process | None
    since: str
    interval: float

    def __str__(self) -> str:
        if self.process is None:
            return f"a process that is not known ({self.since})"
        return f"{self.process}, since {self.since}"


@dataclass(frozen=True)
class Seen:
    """A claim as it stands in the file system; ``beat`` changes with every touch."""

    number: int
    path: Path
    claim: Claim
    beat: int


def new_claim(process: Process, interval: float) -> Claim:
    """A claim that nobody else has made."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Claim(uuid.uuid4().hex, process, since, interval)


def numbers(lock: Path) -> dict[int, Path]:
    """The claims on a place by number."""
    start = f"{lock.name}."
    found = {}
    for path in _beside(lock):
        number = path.name.removeprefix(start)
        if path.name.startswith(start) and number.isdecimal():
            found[int(number)] = path
    return found


def highest(lock: Path, unknown_interval: float) -> Seen | None:
    """The claim that owns the place, None where nobody does.

    ``unknown_interval``: of a claim that cannot be read.
    """
    while found := numbers(lock):
        number = max(found)
        with contextlib.suppress(FileNotFoundError):  # released in this moment: look again
            return look(number, found[number], unknown_interval)
    return None


def look(number: int, path: Path, unknown_interval: float) -> Seen:
    """Read one claim. It is opened every time: a network file system may answer a mere look at
    its times from memory."""
    with path.open("rb") as file:
        content = file.read()
        status = os.fstat(file.fileno())
    try:
        fields = json.loads(content)
        process = Process(**fields.pop("process"))
        claim = Claim(process=process, **fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        claim = Claim(content.hex()[:64], None, f"{path} cannot be understood", unknown_interval)
    return Seen(number, path, claim, status.st_mtime_ns)


def publish(lock: Path, number: int, claim: Claim) -> Path | None:
    """Publish a claim under a number; None where another has it, or the folder is gone."""
    target = lock.with_name(f"{lock.name}.{number}")
    draft = lock.with_name(f"{lock.name}.{claim.token}{_DRAFT}")
    content = json.dumps(asdict(claim), indent=1).encode() + b"\n"
    try:
        _create(draft, content)
        return target if _linked(draft, target) else None
    except (FileExistsError, FileNotFoundError):
        return None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _created(target, content)
    finally:
        draft.unlink(missing_ok=True)


def _linked(draft: Path, target: Path) -> bool:
    try:
        os.link(draft, target)
    except FileExistsError:
        # The answer of a network file system may have been lost, and the request repeated.
        with contextlib.suppress(FileNotFoundError):
            return draft.samefile(target)
        return False
    except FileNotFoundError:
        return False  # the draft was cleaned away by an owner
    return True


def _created(target: Path, content: bytes) -> Path | None:
    """The way of file systems without hard links."""
    try:
        _create(target, content)
    except FileExistsError:
        return None
    return target


def _create(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def remove_others(lock: Path, number: int) -> None:
    """Remove claims below ``number``, which owns the place, and what killed newcomers left."""
    paths = [path for each, path in numbers(lock).items() if each < number]
    draft = re.compile(rf"{re.escape(lock.name)}\.[0-9a-f]{{32}}{re.escape(_DRAFT)}")
    paths += [path for path in _beside(lock) if draft.fullmatch(path.name)]
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _beside(lock: Path) -> Iterator[Path]:
    try:
        with os.scandir(lock.parent) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        names = []
    return (lock.parent / name for name in names)
