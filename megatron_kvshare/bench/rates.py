"""What this device reads and computes at most, measured: the two rates that bounds are made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from megatron_kvshare.bench.bound import Rates
from megatron_kvshare.kernels.choice import on_gpu
from megatron_kvshare.train.peaks import measured_tflops

_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Of the tensor that is read: far beyond any cache."""
_REPEATS = 5


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """By a sum over a large tensor, and by a product of large matrices of ``dtype``."""
    return Rates(read_rate(device), 1e12 * measured_tflops(device, dtype))


def read_rate(device: torch.device, repeats: int = _REPEATS) -> float:
    """Bytes per second, best of a few."""
    size = _BYTES["cpu"]
    if on_gpu(device):
        size = min(_BYTES["cuda"], torch.cuda.mem_get_info(device)[0] // 4)
    data = torch.ones(size // 4, device=device)
    best = min(seconds(data.sum, device) for _ in range(repeats + 1))
    return data.nbytes / best


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes, to the end of what it has started on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return max(time.perf_counter() - start, math.ulp(1.0))


def synchronize(device: torch.device) -> None:
    """Wait for what runs on a GPU."""
    if on_gpu(device):
        torch.cuda.synchronize(device)
