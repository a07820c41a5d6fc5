"""What a card can compute at most: its datasheet's figure, or a measured one."""

from __future__ import annotations

import math
import re
import time
from typing import NamedTuple

import torch

_TERA = 1e12

# NVIDIA's datasheets and architecture whitepapers: dense TFLOP/s with fp32 accumulation of bf16 on
# tensor cores, and of fp32 off them, as torch multiplies by default (no TF32). None: no such unit.
# The first pattern that the name of the device begins with decides.
_CARDS: tuple[tuple[str, float | None, float], ...] = (
    (r"GB(200|300)\b", 2500, 80),
    (r"B[23]00\b", 2250, 75),
    (r"H(100|800) PCIe", 756, 51),
    (r"H100 NVL|H200 NVL", 835, 60),
    (r"(H100|H200|H800|GH200)\b", 989, 67),
    (r"H20\b", 148, 44),
    (r"A[18]00\b", 312, 19.5),
    (r"A30\b", 165, 10.3),
    (r"A40\b", 149.7, 37.4),
    (r"A10\b", 125, 31.2),
    (r"A10G\b", 70, 35),
    (r"L4\b", 121, 30.3),
    (r"L40S\b", 362, 91.6),
    (r"L40\b", 181, 90.5),
    (r"RTX A6000", 154.8, 38.7),
    (r"RTX 6000 Ada", 364, 91.1),
    (r"GeForce RTX 3090 Ti", 80, 40),
    (r"GeForce RTX 3090$", 71, 35.6),
    (r"GeForce RTX 4090$", 165.2, 82.6),
    (r"GeForce RTX 5090$", 209.5, 104.8),
    (r"V100-SXM", None, 15.7),
    (r"V100", None, 14),
    (r"T4\b", None, 8.1),
)


class Peak(NamedTuple):
    """TFLOP/s of one device, and where the figure is from."""

    tflops: float
    source: str


def peak(device: torch.device, dtype: torch.dtype, given: float | None = None) -> Peak:
    """What MFU compares with: ``given`` by the user, else the datasheet's, else measured."""
    if given is not None:
        return Peak(given, "--peak-tflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (known := datasheet_tflops(name, dtype)) is not None:
            return Peak(known, f"the datasheet of {name}")
    return Peak(measured_tflops(device, dtype), "a matrix product measured here")


def datasheet_tflops(name: str, dtype: torch.dtype) -> float | None:
    """Of the card that torch calls ``name``; None where it is not known."""
    model = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    for pattern, bf16, fp32 in _CARDS:
        if re.match(pattern, model):
            return {torch.bfloat16: bf16, torch.float32: fp32}.get(dtype)
    return None


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one device in a matrix product, best of a few."""
    size, repeats = (8192, 10) if device.type == "cuda" else (512, 5)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / _TERA
