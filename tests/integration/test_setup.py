"""tools/setup_env.sh installs once, again after a change, and fails plainly; no network is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.world import PATIENCE_SECONDS
from tests.integration.conftest import ROOT

# Stands for the environment's Python: notes what pip is asked to do instead of doing it.
FAKE_PYTHON = f"""#!/usr/bin/env bash
if [[ "$1 $2 $3" == "-m pip install" ]]; then
  echo "DS_BUILD_OPS=${{DS_BUILD_OPS:-}} $*" >> "$(dirname "$0")/../pip.log"
  exit "${{PIP_FAILS:-0}}"
fi
exec {sys.executable} "$@"
"""


class Clone:
    """The files the set-up reads, and an environment whose pip only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv = folder, folder / "venv"
        (self.venv / "bin").mkdir(parents=True)
        python = self.venv / "bin" / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
        for name in ("tools/setup_env.sh", "constraints.txt", "setup.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)

    def setup(self, **more: str) -> subprocess.CompletedProcess[str]:
        own = {"PYTHON": sys.executable, "VENV": str(self.venv), **more}
        read = ("TORCH_INDEX_URL", "SKIP_SETUP")
        clean = {name: value for name, value in os.environ.items() if name not in read}
        return subprocess.run(
            ["bash", str(self.folder / "tools" / "setup_env.sh")],
            env={**clean, **own},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def pip_calls(self) -> list[str]:
        log = self.venv / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_installs_once(clone: Clone):
    first = clone.setup()
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(clone.venv / "bin" / "python")
    assert len(clone.pip_calls()) == 1
    assert "DS_BUILD_OPS=0" in clone.pip_calls()[0] and "constraints.txt" in clone.pip_calls()[0]
    again = clone.setup()
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert len(clone.pip_calls()) == 1


def test_installs_again_when_a_version_changes(clone: Clone):
    clone.setup()
    with (clone.folder / "constraints.txt").open("a") as constraints:
        constraints.write("left-pad==1.0\n")
    clone.setup()
    assert len(clone.pip_calls()) == 2


def test_torch_comes_from_the_index_that_is_named(clone: Clone):
    clone.setup(TORCH_INDEX_URL="https://example.org/cpu")
    torch, rest = clone.pip_calls()
    assert "--index-url https://example.org/cpu torch" in torch
    assert "--index-url" not in rest


def test_a_failed_installation_is_no_success(clone: Clone):
    failed = clone.setup(PIP_FAILS="1")
    assert failed.returncode == 2
    assert "could not be installed" in failed.stderr and not failed.stdout
    assert clone.setup().returncode == 0
    assert len(clone.pip_calls()) == 2


def test_no_usable_python_is_told(clone: Clone):
    failed = clone.setup(PYTHON="python3.4")
    assert failed.returncode == 2
    assert "no usable Python 3.11 or later among: python3.4" in failed.stderr


def test_a_ready_environment_is_taken_as_it_is(clone: Clone):
    done = clone.setup(SKIP_SETUP="1")
    assert done.stdout.strip() == sys.executable
    assert not clone.pip_calls()
