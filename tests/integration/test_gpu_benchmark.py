"""The one command that measures a GPU runs on a CPU too, with a toy; how a trace is summed up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.distributed.world import PATIENCE_SECONDS
from tests.integration.conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


def test_every_row_is_measured_or_named(tmp_path) -> None:
    """With time for all, and with time for one."""
    for budget, rows in (("170", 9), ("0", 1)):
        words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--budget", budget]
        done = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert len(found["rows"]) == rows
        for row in found["rows"]:
            assert not row["missing"] and row["seconds"] > 0 and row["tflops"] > 0
        assert found["rows"][0]["name"] == "standard" and found["card"]["measured_tflops"] > 0
        assert (tmp_path / "gpu.png").stat().st_size > 10_000
        assert ("Left out" in done.stdout) == (rows == 1)
    assert "pizza-bottom 3, sandwich-top 2 one-sweep" in " ".join(done.stdout.split())


@pytest.fixture
def gpu_trace(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_trace

    return gpu_trace


def test_time_by_kind(gpu_trace) -> None:
    kernels = [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32", 0.0, 2.0),
        ("triton_red_fused_add_mul", 3.0, 4.0),
        ("Memcpy DtoD (Device -> Device)", 3.5, 4.5),  # beside the one before
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", 5.0, 6.0),
    ]
    trace = gpu_trace.summary(reversed(kernels), seconds=7.0)
    assert trace.busy == pytest.approx(4.5)
    wanted = {"products": 2, "fused": 1, "copies": 1, "attention": 1, "idle": 2.5}
    assert trace.kinds == pytest.approx({**dict.fromkeys(gpu_trace.KINDS, 0.0), **wanted})


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "products"),
        ("cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_nn_align8", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        (
            "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<BFloat16>>",
            "elementwise",
        ),
        ("void at::native::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 4, 64>", "copies"),
    ],
)
def test_kinds_by_the_names_that_kernels_have(gpu_trace, kernel, kind) -> None:
    assert gpu_trace.kind_of(kernel) == kind
