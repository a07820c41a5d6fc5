"""A process that other machines can name, and whether one still lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Life = Literal["alive", "dead", "unknown"]

_JOBS = {
    "SLURM_JOB_ID": "SLURM",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "FLUX_JOB_ID": "Flux",
    "OAR_JOB_ID": "OAR",
    "JOB_ID": "Grid Engine",
}
"""Variables by which schedulers name a job."""
_STATE, _BORN = 0, 19
"""Fields of /proc/PID/stat, counted after the name of the program, which may hold spaces."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """``machine``, ``boot`` and ``namespace`` say where ``pid`` means anything, ``born`` (clock
    ticks after the boot) tells a process from a later one of the same number. ``job`` is the
    scheduler's, started again ``restarts`` times by the same number. Empty or None: unknown.
    """

    host: str
    machine: str = ""
    boot: str = ""
    namespace: str = ""
    pid: int
    born: int | None = None
    job: str = ""
    restarts: int = 0
    step: str = ""

    def __str__(self) -> str:
        step = f" step {self.step}" if self.step else ""
        again = f" (restart {self.restarts})" if self.restarts else ""
        job = f", {self.job}{step}{again}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def life_of(self, other: Process) -> Life:
        """Whether ``other`` lives, as far as this process, the current one, can know for sure."""
        if self.host != other.host:
            return "unknown"
        if self.boot != other.boot:
            # A host name alone is no machine: containers and laptops share theirs.
            rebooted = bool(self.boot and other.boot and self.machine)
            return "dead" if rebooted and self.machine == other.machine else "unknown"
        if self.namespace != other.namespace:
            return "unknown"
        return _life(other.pid, other.born)

    def requeued(self, other: Process) -> bool:
        """Whether this process belongs to a later start of the job of ``other``."""
        return bool(self.job) and self.job == other.job and self.restarts > other.restarts


def this_process(environ: Mapping[str, str] = os.environ) -> Process:
    """The current process."""
    stat = _stat(os.getpid())
    return Process(
        host=socket.gethostname(),
        machine=_text(Path("/etc/machine-id")),
        boot=_text(Path("/proc/sys/kernel/random/boot_id")),
        namespace=_namespace(),
        pid=os.getpid(),
        born=int(stat[_BORN]) if stat else None,
        job=_job(environ),
        restarts=_count(environ.get("SLURM_RESTART_COUNT", "0")),
        step=environ.get("SLURM_STEP_ID", ""),
    )


def _job(environ: Mapping[str, str]) -> str:
    """``SLURM job 12``; clusters that share a file system may give the same number."""
    for name, scheduler in _JOBS.items():
        if number := environ.get(name):
            cluster = environ.get("SLURM_CLUSTER_NAME", "") if scheduler == "SLURM" else ""
            return f"{scheduler} job {number}" + (f" of {cluster}" if cluster else "")
    return ""


def _life(pid: int, born: int | None) -> Life:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        pass  # another user's, but there
    stat = _stat(pid)
    if not stat:
        return "alive"  # /proc may hide it, the signal found it
    if stat[_STATE] in "ZX":
        return "dead"  # only its parent has not taken note
    return "alive" if born is None or born == int(stat[_BORN]) else "dead"


def _stat(pid: int) -> list[str]:
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: Path) -> str:
    """Empty where there is no such file, or none that may be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _count(text: str) -> int:
    return int(text) if text.isdecimal() else 0
