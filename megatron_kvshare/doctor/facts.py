"""What ``kvshare doctor --distributed`` asks every rank, and what is wrong there."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import megatron_kvshare
from megatron_kvshare.doctor.checks import REQUIRED, SETUP, installed_version
from megatron_kvshare.doctor.config import PreflightConfig
from megatron_kvshare.errors import Fault, runs

_SHOWN_HOSTS = 4
_SHOWN_FILES = 3
_VISIBLE_SECONDS = 5.0
"""A network file system may show a new file to other nodes a little later."""


@dataclass(frozen=True)
class Facts:
    """One rank's answer.

    ``versions``: of Python, packages, CUDA and NCCL by name; ``code``: digests of this package's
    files by their path in ``package``; ``device``: ``cpu`` or the name of a GPU, ``devices``: how
    many GPUs the rank can choose from; ``folder``: where --save will be, with ``free_bytes`` and
    what is wrong with it, in words.
    """

    rank: int
    host: str
    local_rank: int
    versions: dict[str, str]
    package: str
    code: dict[str, str]
    device: str
    devices: int
    folder: str = ""
    free_bytes: int = 0
    folder_fault: str = ""


def facts_here(config: PreflightConfig, rank: int, probe: str) -> Facts:
    """This rank's answer; ``probe`` is a file that the first rank has put where --save will be."""
    package = Path(megatron_kvshare.__file__).parent
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if config.distributed_backend != "gloo" else 0
    usable = torch.cuda.get_device_name(local_rank) if local_rank < gpus else "GPU"
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        local_rank=local_rank,
        versions=versions(),
        package=str(package),
        code=digests(package),
        device=usable if gpus else "cpu",
        devices=gpus,
        **({} if config.save is None else look_at(Path(probe), rank, writes=local_rank == 0)),
    )


def versions() -> dict[str, str]:
    """By name, of everything that has to be the same on every node; only what is there."""
    found = {package.name: installed_version(package.name) for package in REQUIRED}
    cuda = {"CUDA of torch": torch.version.cuda}
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        cuda["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    every = {"Python": platform.python_version(), **found, **cuda}
    return {name: version for name, version in every.items() if version is not None}


def digests(package: Path) -> dict[str, str]:
    """A digest of every source file, by its path inside the package."""
    return {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(package.rglob("*.py"))
    }


def digest_of_all(code: dict[str, str]) -> str:
    """One short name for a version of the code."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(code.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def nearest_folder(save: str) -> Path:
    """Where --save will be made: the nearest folder that exists. Training makes the rest."""
    path = Path(save).absolute()
    return next(each for each in (path, *path.parents) if os.path.isdir(each))


def look_at(probe: Path, rank: int, writes: bool) -> dict[str, str | int]:
    """The fields of :class:`Facts` about the folder of ``probe``; ``writes``: try to write, too."""
    folder, fault, free = probe.parent, "", 0
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        if not probe.exists():
            fault = "is not the folder that rank 0 sees"
        elif writes:
            mine = probe.with_name(f"{probe.name}-{rank}")
            mine.touch()
            mine.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        fault = f"cannot be written: {error.strerror}"
    return {"folder": str(folder), "free_bytes": free, "folder_fault": fault}


# Judging ------------------------------------------------------------------------------------------


def faults(config: PreflightConfig, answers: Sequence[Facts]) -> list[Fault]:
    """Everything that would make this job fail or go wrong."""
    found = [*_versions_differ(answers), *_code_differs(answers), *_devices(answers)]
    return found + list(_folder(config, answers)) if config.save is not None else found


def spread(answers: Sequence[Facts], value: Callable[[Facts], str]) -> dict[str, str]:
    """Which nodes answer what: the hosts by value, the value of most ranks first."""
    ranks = Counter(map(value, answers))
    hosts = defaultdict(list)
    for facts in answers:
        if facts.host not in hosts[value(facts)]:
            hosts[value(facts)].append(facts.host)
    return {each: _names(hosts[each]) for each, _ in ranks.most_common()}


def _names(hosts: Sequence[str]) -> str:
    more = f" and {len(hosts) - _SHOWN_HOSTS} more" if len(hosts) > _SHOWN_HOSTS else ""
    return ", ".join(hosts[:_SHOWN_HOSTS]) + more


def _told(found: dict[str, str]) -> str:
    return "; ".join(f"{value} on {hosts}" for value, hosts in found.items())


def _versions_differ(answers: Sequence[Facts]) -> Iterator[Fault]:
    names = dict.fromkeys(name for facts in answers for name in facts.versions)
    fix = f"run `{SETUP}` on every node, or put the environment where all nodes see it"
    for name in names:
        found = spread(answers, lambda facts, name=name: facts.versions.get(name, "none"))
        if len(found) > 1:
            yield Fault(f"version of {name}", _told(found), "all nodes need the same one", fix)


def _code_differs(answers: Sequence[Facts]) -> Iterator[Fault]:
    found = spread(answers, lambda facts: f"{digest_of_all(facts.code)} in {facts.package}")
    if len({digest_of_all(facts.code) for facts in answers}) == 1:
        return
    every = {item for facts in answers for item in facts.code.items()}
    common = set.intersection(*(set(facts.code.items()) for facts in answers))
    files = sorted({name for name, _ in every - common})
    more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
    rule = f"all nodes need the same code; it differs in {', '.join(files[:_SHOWN_FILES])}{more}"
    fix = "start from a folder that all nodes see, or bring the copies up to the same version"
    yield Fault("code of megatron_kvshare", _told(found), rule, fix)


def _devices(answers: Sequence[Facts]) -> Iterator[Fault]:
    kinds = spread(answers, lambda facts: "GPU" if facts.devices else "no GPU")
    if len(kinds) > 1:
        fix = "leave out the nodes where `nvidia-smi` fails, or use --distributed-backend gloo"
        yield Fault("devices", _told(kinds), "all ranks train on GPUs or none does", fix)
    users = defaultdict(list)
    for facts in answers:
        if not facts.devices:
            continue
        users[facts.host, facts.local_rank].append(facts.rank)
        if facts.local_rank >= facts.devices:
            where = f"rank {facts.rank} on {facts.host}"
            rule = f"it is to use GPU number {facts.local_rank}, and there are {facts.devices}"
            fix = "start as many processes on a node as it has GPUs"
            yield Fault(where, f"{facts.devices} GPUs", rule, fix)
    for (host, number), ranks in users.items():
        if len(ranks) > 1:
            fix = "set LOCAL_RANK to the number of the process on its node"
            rule = "a GPU is for one rank"
            yield Fault(f"GPU {number} of {host}", f"ranks {runs(ranks)}", rule, fix)


def _folder(config: PreflightConfig, answers: Sequence[Facts]) -> Iterator[Fault]:
    broken = [facts for facts in answers if facts.folder_fault]
    for problem, hosts in spread(broken, lambda facts: facts.folder_fault).items():
        fix = "give --save a folder on a file system that all nodes see, and that you may write to"
        yield Fault("--save", config.save, f"{answers[0].folder} on {hosts} {problem}", fix)
    least = min(answers, key=lambda facts: facts.free_bytes)
    if not broken and least.free_bytes < config.save_bytes:
        rule = (
            f"{size(least.free_bytes)} are free on {least.host}, and --save-bytes wants"
            f" {size(config.save_bytes)}"
        )
        fix = "make room there, or give --save another folder"
        yield Fault("--save", config.save, rule, fix)


def size(count: float) -> str:
    """Bytes in words: ``1.5 GB``."""
    units = ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"
