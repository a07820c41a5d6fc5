"""Which process of a job this one is: torchrun's variables, and whether they can be true.

Ranks are announced by ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and the address to meet at, as
torchrun and DeepSpeed's launcher set them. Other launchers start processes too, by variables of
their own: where one has started more of them than have been counted, each would take itself for the
whole job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatron_kvshare.errors import ConfigError, Fault


class Launch(NamedTuple):
    """A process's place in its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


class _Launcher(NamedTuple):
    """Variables by which a launcher tells a process how many it has started, and its number among
    them (of these and of the same host); empty where it does not tell."""

    name: str
    size: str
    rank: str
    local_rank: str = ""


_LAUNCHERS = (
    _Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    _Launcher(
        "mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
    ),
    _Launcher("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    _Launcher("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    _Launcher("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK"),
    _Launcher("mpiexec", "MPI_LOCALNRANKS", "MPI_LOCALRANKID", "MPI_LOCALRANKID"),
    _Launcher("mpirun", "", "PMIX_RANK"),
)
_OF_SRUN = "SLURM_STEP_ID"
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""Steps from here on are SLURM's own: batch scripts, shells of salloc."""
_AT_LEAST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 1, "CROSS_SIZE": 1}
_PER_NODE = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}
"""Launchers that are started once per node, and how they tell the number of nodes."""
_MORE_NODES = {
    "torchrun": "give torchrun --nnodes, --node_rank and --master_addr",
    "deepspeed": "give deepspeed --hostfile, --no_ssh, --node_rank and --master_addr",
}
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *_PER_NODE.values())


def launched(environ: Mapping[str, str] = os.environ) -> Launch:
    """The place of this process; the only one of its job where no launcher says anything.

    Raises:
        ConfigError: the variables contradict each other, or processes were not counted.
    """
    faults = list(launch_faults(environ))
    if faults:
        raise ConfigError(faults)
    return Launch(*(_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process tells the user what all of its job meet, before its place is checked."""
    names = ["RANK", *(each.rank for each in _LAUNCHERS if _has_started(each, environ))]
    given = (environ[name] for name in names if name in environ)
    return next(given, "0") == "0"


def launch_faults(environ: Mapping[str, str]) -> Iterator[Fault]:
    """What is wrong with the variables of all launchers."""
    wrong = list(number_faults(environ))
    yield from wrong
    if wrong:
        return
    yield from _contradictions(environ)
    yield from _uncounted(environ)


def number_faults(environ: Mapping[str, str]) -> Iterator[Fault]:
    """Variables that are no numbers."""
    others = [name for each in _LAUNCHERS if _has_started(each, environ) for name in each[1:3]]
    for name in dict.fromkeys((*_OF_TORCHRUN, *others)):
        text, least = environ.get(name), _AT_LEAST.get(name, 0)
        if text is None or (text.isdecimal() and int(text) >= least):
            continue
        what = "the number of processes" if name == "WORLD_SIZE" else "it"
        rule = f"{what} must be a whole number of at least {least}"
        fix = f"start with torchrun, which sets it, or unset {name}"
        if name in others:
            fix = f"unset {name}, or leave it as the launcher sets it"
        yield _fault(name, text, rule, fix)


def _contradictions(environ: Mapping[str, str]) -> Iterator[Fault]:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local, local_size = _number(environ, "LOCAL_RANK"), environ.get("LOCAL_WORLD_SIZE")
    fix = "start with torchrun, which sets both"
    if "WORLD_SIZE" not in environ and rank > 0:
        rule = "a rank above 0 needs WORLD_SIZE, the number of processes"
        yield _fault("RANK", rank, rule, f"{fix}, or unset RANK to run alone")
    elif "RANK" not in environ and size > 1:
        rule = "each of several processes needs its RANK"
        yield _fault("WORLD_SIZE", size, rule, f"{fix}, or unset WORLD_SIZE to run alone")
    elif rank >= size:
        rule = f"ranks are 0 to {size - 1}: WORLD_SIZE is {size}"
        yield _fault("RANK", rank, rule, fix)
    if local_size is not None and local >= int(local_size):
        rule = f"local ranks are 0 to {int(local_size) - 1}: LOCAL_WORLD_SIZE is {local_size}"
        yield _fault("LOCAL_RANK", local, rule, fix)
    if size > 1:
        yield from _address_faults(environ)


def _address_faults(environ: Mapping[str, str]) -> Iterator[Fault]:
    fix = "start with torchrun, which sets it, or export it before all processes are started"
    if not environ.get("MASTER_ADDR"):
        rule = "several processes need it, to meet: the host of rank 0"
        yield _fault("MASTER_ADDR", environ.get("MASTER_ADDR"), rule, fix)
    port = environ.get("MASTER_PORT")
    if port is None or not port.isdecimal() or not 0 < int(port) < 2**16:
        rule = "several processes need it, to meet: a free port of that host, 1 to 65535"
        yield _fault("MASTER_PORT", port, rule, fix)


def _uncounted(environ: Mapping[str, str]) -> Iterator[Fault]:
    """More processes than this one believes in; those of a torchrun count as one."""
    by = _started_by(environ)
    counted = _number(environ, "WORLD_SIZE" if by is None else _PER_NODE[by])
    for each in _LAUNCHERS:
        started = _started(each, environ)
        if started <= counted:
            continue
        said_by = each.size if each.size in environ else each.rank
        rule = f"{each.name} has started at least {started} processes, and each of them takes"
        rule += " itself for the whole job" if counted == 1 else f" the job for {counted} of them"
        if by is not None:
            rule = f"{each.name} has started at least {started} times {by}, for {counted} nodes"
        yield _fault(said_by, environ[said_by], rule, _how_to_count(each, environ))
        return


def _how_to_count(launcher: _Launcher, environ: Mapping[str, str]) -> str:
    told = [name for name in (launcher.size, launcher.rank) if name in environ]
    alone = "where each is meant to be a job of its own, with a --save folder of its own, start it"
    alone += f" by `env {' '.join(f'-u {name}' for name in told)} kvshare ...`"
    by = _started_by(environ)
    if by is not None:
        return f"{_MORE_NODES[by]}; {alone}"
    how = f"start one torchrun per node; {alone}"
    if not launcher.size or not launcher.local_rank:
        return how
    return (
        "export MASTER_ADDR (the host of rank 0) and MASTER_PORT, and start with"
        f" `{launcher.name} ... bash -c 'RANK=${launcher.rank} WORLD_SIZE=${launcher.size}"
        f" LOCAL_RANK=${launcher.local_rank} exec kvshare ...'`; or {how}"
    )


def _started(launcher: _Launcher, environ: Mapping[str, str]) -> int:
    """How many processes a launcher has started at least."""
    if not _has_started(launcher, environ):
        return 0
    return max(int(environ.get(launcher.size, 0)), int(environ.get(launcher.rank, -1)) + 1)


def _has_started(launcher: _Launcher, environ: Mapping[str, str]) -> bool:
    """srun's variables also stand in batch scripts and in shells of salloc, which it has not
    started."""
    if launcher.name != "srun":
        return True
    step = environ.get(_OF_SRUN, "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _started_by(environ: Mapping[str, str]) -> str | None:
    """The launcher that was started once per node; None where there is none."""
    return next((name for name, variable in _PER_NODE.items() if variable in environ), None)


def _number(environ: Mapping[str, str], name: str) -> int:
    return int(environ.get(name, _AT_LEAST.get(name, 0)))


def _fault(name: str, value: object, rule: str, fix: str) -> Fault:
    return Fault(f"environment variable {name}", value, rule, fix)


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """A configuration error inside is met by every process, and told by one.

    Raises:
        ConfigError: where this process tells it.
        SystemExit: on the others, with the same exit code.
    """
    try:
        yield
    except ConfigError as error:
        if speaks():
            raise
        raise SystemExit(error.exit_code) from None
