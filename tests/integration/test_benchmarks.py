"""Every benchmark that takes minutes runs and reports; how fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.distributed.world import PATIENCE_SECONDS
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.nightly
QUICK = {
    "train_step": ("--rounds", "1", "--maps", "pizza-bottom", "sandwich-top"),
    "checkpoint": ("--rounds", "1"),
    "preprocess": ("--pairs", "1", "--mb", "1", "--memory-mb", "2"),
    "loader": ("--rounds", "1", "--batches", "20"),
    "pipeline": ("--microbatches", "2", "--png", "pipeline.png"),
    "recipes_1b": (
        *("--config", str(ROOT / "examples" / "configs" / "small.yaml")),
        *("--steps", "5", "--seeds", "1", "--batches", "1"),
    ),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_reports_what_it_measured(name, tmp_path):
    words = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *QUICK[name]]
    words += ["--json", str(tmp_path / "found.json")]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text())
