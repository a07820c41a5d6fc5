"""A copy of the repository to submit jobs from, on a cluster that answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.conftest import Workspace
from tests.slurm import cluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them need a cluster: one that SLURM_CONF names, or the one of tests/slurm/cluster."""
    mine = [item for item in items if HERE in item.path.parents]
    there = bool(mine) and cluster.answers()
    for item in mine:
        item.add_marker(pytest.mark.slurm)
        if not there:
            item.add_marker(pytest.mark.skip(reason="no SLURM cluster: tests/slurm/run.sh"))


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that jobs are submitted from; all nodes see it. Its corpus is made."""
    workspace = Workspace(tmp_path_factory.mktemp("clone"))
    (workspace.folder / "logs").mkdir()
    done = workspace.bash("bash examples/prepare_corpus.sh")
    assert done.returncode == 0, done.stderr
    return workspace.folder


@pytest.fixture
def test_cluster() -> None:
    """Faults can be injected: the cluster is the one of tests/slurm/cluster."""
    if "SLURM_TEST_DIR" not in os.environ:
        pytest.skip("breaks nodes: only on the cluster of tests/slurm/cluster")
