"""Other versions of packages than the environment's, installed beside it for a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.integration.conftest import ROOT


def install(name: str, *requirements: str, dependencies: bool = False) -> Path:
    """A folder for ``PYTHONPATH`` with these packages; made once for each Python, under runs/."""
    folder = ROOT / "runs" / f"side-packages-{sys.version_info[0]}.{sys.version_info[1]}" / name
    if not (folder / "complete").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        command += (
            ["--constraint", str(ROOT / "constraints.txt")] if dependencies else ["--no-deps"]
        )
        subprocess.run([*command, *requirements], check=True)
        (folder / "complete").touch()
    return folder


def run(
    folder: Path, *arguments: str | Path, seconds: float = 600, beside: Sequence[Path] = ()
) -> str:
    """Run Python with the packages in ``folder`` first, then those ``beside`` it; returns what it
    printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": ":".join(map(str, (folder, *beside, ROOT))),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
