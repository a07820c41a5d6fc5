"""The main example at full size: a large GPU, two to four minutes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_kvshare.megatron_api.parallel import ParallelState
from tests.integration.conftest import ROOT, Workspace
from tests.integration.pretrain_jobs import losses
from tests.parity.test_gpu_route import skip_elsewhere

GPU_BYTES, DISK_BYTES = 60 * 2**30, 30 * 2**30
"""What the run takes at most, and its checkpoint, which is written aside first."""
LAST_LOSS = 6.3


@pytest.mark.gpu
def test_the_1b_model_learns_without_a_warning(single: ParallelState, tmp_path: Path):
    skip_elsewhere("cuda", single)
    skip_where_it_does_not_fit(single, tmp_path)
    workspace = Workspace(tmp_path)
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data", dirs_exist_ok=True)
    one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = "bash examples/pretrain_1b_top_share.sh --train-iters 30"
    done = workspace.bash(command, {"CUDA_VISIBLE_DEVICES": one_gpu}, timeout_seconds=900)
    shutil.rmtree(tmp_path / "runs" / "1b-sandwich-top-11" / "checkpoint", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    found = losses(tmp_path / "runs" / "1b-sandwich-top-11" / "metrics.jsonl")
    assert found[30] < LAST_LOSS


def skip_where_it_does_not_fit(state: ParallelState, folder: Path) -> None:
    import torch

    torch.cuda.empty_cache()  # what earlier tests of this process have left
    free, _ = torch.cuda.mem_get_info(state.platform.device)
    if free < GPU_BYTES:
        pytest.skip(f"needs {GPU_BYTES / 2**30:.0f} GiB of a GPU, {free / 2**30:.0f} are free")
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        pytest.skip(f"needs {DISK_BYTES / 2**30:.0f} GiB at {folder}, {free / 2**30:.0f} are free")
