"""Which kernels tensors take: decided here and nowhere else."""

from __future__ import annotations

import torch

from megatron_kvshare.kernels import flash
from megatron_kvshare.kernels.compiling import compile_fault
from megatron_kvshare.kernels.flash import CausalKernel


def on_gpu(device: torch.device) -> bool:
    """Whether tensors of ``device`` take the GPU's kernels."""
    return device.type == "cuda"


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Generation of a GPU, for example (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


def is_compiled(device: torch.device, wanted: bool) -> bool:
    """Whether fused operations on ``device`` are compiled; ``wanted``: by ``--compile-kernels``."""
    return wanted and on_gpu(device) and compile_fault() is None


def has_subset_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, compile_wanted: bool
) -> bool:
    """Whether a token subset's attention is one compiled kernel; else it is one causal kernel for
    each block of keys, or a mask."""
    width_fits = head_dim in (16, 32, 64, 128, 256)  # others are padded, or refused by older torch
    has_blocks = causal_kernel(device, dtype, head_dim) is not None
    return is_compiled(device, compile_wanted) and has_blocks and width_fits


def causal_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> CausalKernel | None:
    """The kernel for such tensors, or None where none can serve and a mask has to."""
    if not on_gpu(device):
        return flash.CPU
    is_half = dtype in (torch.bfloat16, torch.float16)
    if is_half and head_dim % 8 == 0 and head_dim <= 256 and compute_capability(device) >= (8, 0):
        return flash.CUDA
    return None
