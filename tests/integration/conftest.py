"""A copy of the repository to run commands in: its scripts, a shortened corpus, this Python."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.distributed.world import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
DOCUMENTS, CHARACTERS = 100, 3000
"""What the copy keeps of the corpus: messages, and the start of each."""


def shortened(jsonl: bytes) -> bytes:
    documents = [json.loads(line) for line in jsonl.splitlines()[:DOCUMENTS]]
    lines = [json.dumps({"text": document["text"][:CHARACTERS]}) for document in documents]
    return "\n".join(lines).encode()


class Workspace:
    """A folder that looks like a fresh clone, with an environment that is already set up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("megatron_kvshare", "tools", "setup.py", "constraints.txt", "slurm"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "examples", folder / "examples")
        for corpus in (folder / "examples" / "data").glob("*.jsonl.xz"):
            corpus.write_bytes(lzma.compress(shortened(lzma.decompress(corpus.read_bytes()))))

    def bash(
        self,
        code: str,
        more: Mapping[str, str] | None = None,
        timeout_seconds: float = PATIENCE_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run bash code there, stopping at the first failing command."""
        outside_a_job = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment = {
            **outside_a_job,
            "SKIP_SETUP": "1",
            "PYTHON": sys.executable,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **(more or {}),
        }
        for inherited in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            environment.pop(inherited, None)
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One copy for all tests of the session; the prepared corpus in it is made once."""
    return Workspace(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="session")
def format_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints made by the last version that wrote format 4, by means of megatron-core, on
    two data-parallel ranks, after three of six steps."""
    return unpacked("format_4", tmp_path_factory)


@pytest.fixture(scope="session")
def format_6(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a cyclic map made while one sweep was the default recipe, without
    `--kv-recipe`, on one process, after three of six steps; one with `--kv-start self`."""
    return unpacked("format_6", tmp_path_factory)


def unpacked(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(name)
    with tarfile.open(Path(__file__).with_name(f"{name}.tar.xz")) as packed:
        packed.extractall(root)
    return root
