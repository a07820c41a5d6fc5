"""A SLURM cluster as the tests use it: submit a job, watch it, disturb it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FAULTS = Path(__file__).parent / "cluster" / "node.sh"
SUBMIT = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")
# Smaller than examples/configs/small.yaml; enough steps to be disturbed in the middle of them.
SMALL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --seq-length 32 --train-iters 120"
    " --micro-batch-size 2 --global-batch-size 8 --log-interval 1 --eval-iters 1 --peak-tflops 1"
)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def answers() -> bool:
    """Whether a controller is there."""
    try:
        ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "is UP" in ping.stdout


def command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


class Job:
    """A submitted job, or one element of an array (`123_1`)."""

    def __init__(self, number: str, folder: Path, save: Path) -> None:
        self.number, self.folder, self.save = number, folder, save

    def field(self, name: str) -> str:
        shown = command("scontrol", "-o", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found.group(1)

    @property
    def nodes(self) -> list[str]:
        return command("scontrol", "show", "hostnames", self.field("NodeList")).split()

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def wait_for_end(self, seconds: float = 900) -> str:
        """The state it ended in."""
        self.wait(lambda: self.field("JobState") in ENDED, seconds, "the job to end")
        return self.field("JobState")

    def wait_for_steps(self, count: int, seconds: float = 600) -> None:
        """Until so many steps are in the metrics file."""
        self.wait(lambda: len(self.losses()) >= count, seconds, f"{count} steps")

    def wait(self, done: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"waiting for {what}\n{self.log()}"
            time.sleep(0.5)

    def _records(self) -> list[dict]:
        """Of the training steps in the metrics file."""
        metrics = self.save.parent / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [each for each in map(json.loads, lines) if "loss" in each]

    def steps(self) -> list[int]:
        """As they are written."""
        return [each["step"] for each in self._records()]

    def losses(self) -> dict[int, float]:
        """By step."""
        return {each["step"]: each["loss"] for each in self._records()}

    @property
    def logs(self) -> Path:
        return self.folder / "logs" / f"kvshare-{self.number}"

    def log(self) -> str:
        """What batch script and preflight said, and then every process."""
        files = sorted(path for path in self.logs.glob("*") if path.is_file())
        return "".join(f"== {path.name}\n{path.read_text()}" for path in files)


def submit(
    folder: Path,
    save: Path,
    example: str = "examples/pretrain_110m.sh",
    more: Mapping[str, str] | None = None,
    flags: str = "",
    options: tuple[str, ...] = (),
) -> Job:
    """Start `slurm/pretrain.sbatch` from `folder`: 2 nodes x 2 processes, tensor parallel."""
    own = {"SAVE": str(save), "TP": "2", "MAP": "pizza-bottom", "KV_LAYERS": "3", **(more or {})}
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **{name: value for name, value in os.environ.items() if name.startswith("SLURM_CONF")},
        "SKIP_SETUP": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "STEP_WAIT": "20",
        **own,
    }
    words = ["sbatch", "--parsable", *SUBMIT, *options, "slurm/pretrain.sbatch", example]
    done = subprocess.run(
        [*words, *SMALL.split(), *flags.split()],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Job(done.stdout.split(";")[0].strip(), folder, save)


def disturb(fault: str, node: str) -> None:
    """What the test cluster's `node.sh` does: crash, start, resume, ..."""
    subprocess.run(["bash", str(FAULTS), fault, node], check=True, timeout=60)


def processes(job: Job) -> list[int]:
    """The trainers of a job, in the order they were started; on one machine with its nodes."""
    mine = f"SLURM_JOB_ID={job.field('JobId')}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mine in variables and words[1:4] == [b"-m", b"megatron_kvshare", b"pretrain"]:
            found.append(int(folder.name))
    return sorted(found)
