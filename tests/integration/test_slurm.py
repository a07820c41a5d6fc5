"""slurm/pretrain.sbatch starts an example on each node; srun and scontrol are stand-ins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.conftest import Workspace

# Runs the command that follows srun's own options once, as the second of the nodes.
FAKE_SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "srun option $1"; shift; done
SLURM_NODEID=1 exec "$@"
"""
FAKE_SCONTROL = "#!/usr/bin/env bash\nprintf 'first-node\\nsecond-node\\n'\n"
SHOW = 'echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT, arguments: $*"\n'
JOB = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "nodes[1-2]",
    "SLURM_JOB_ID": "123",
    "SLURM_CPUS_PER_TASK": "4",
}


@pytest.fixture
def job(workspace: Workspace, tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, with the stand-ins first on the PATH."""
    for name, code in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(code)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {**JOB, "SLURM_SUBMIT_DIR": str(workspace.folder), "PATH": path}


def test_every_node_starts_the_example(workspace: Workspace, job: dict[str, str]):
    (workspace.folder / "show.sh").write_text(SHOW)
    done = workspace.bash("bash slurm/pretrain.sbatch show.sh --lr '1e-3'", job)
    assert done.returncode == 0, done.stderr
    assert "2 1 first-node 20123, arguments: --lr 1e-3" in done.stdout
    assert "srun option --ntasks=2" in done.stdout
    assert "srun option --cpus-per-task=4" in done.stdout


def test_a_missing_example_is_told(workspace: Workspace, job: dict[str, str]):
    done = workspace.bash("bash slurm/pretrain.sbatch examples/nothing.sh", job)
    assert done.returncode == 2
    assert "submit from the root of the repository" in done.stderr
