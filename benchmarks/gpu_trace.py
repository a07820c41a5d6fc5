"""One step under torch's profiler: how long a kernel ran, and of which kind each was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = ("products", "attention", "fused", "optimizer", "copies", "elementwise", "idle")
"""The kinds of time; ``fused``: made by torch.compile; ``idle``: no kernel ran."""

# By the names of kernels, the first that fits.
_NAMES = (
    ("attention", r"flash|fmha|attention|sdpa|flex"),
    ("fused", r"triton"),
    ("optimizer", r"adam|multi_tensor|lpnorm|l2norm"),
    ("products", r"gemm|cutlass|nvjet|cublas|xmma|splitK"),
    ("copies", r"memcpy|memset|copy|CatArray|fill"),
)


class Trace(NamedTuple):
    """Seconds of a step, those in which at least one kernel ran, and those of each kind."""

    seconds: float
    busy: float
    kinds: dict[str, float]


def traced(step: Callable[[], float]) -> Trace:
    """Of ``step``, which returns its seconds."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds = step()
    kernels = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return summary(kernels, seconds)


def summary(kernels: Iterable[tuple[str, float, float]], seconds: float) -> Trace:
    """Of kernels by name, start and end in seconds. What runs beside another kernel counts for its
    kind, and once for ``busy``."""
    kinds, busy, until = dict.fromkeys(KINDS, 0.0), 0.0, float("-inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        kinds[kind_of(name)] += end - start
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    kinds["idle"] = max(0.0, seconds - busy)
    return Trace(seconds, busy, kinds)


def kind_of(kernel: str) -> str:
    """By the kernel's name."""
    found = (kind for kind, pattern in _NAMES if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "elementwise")
