"""Where the job runs: CUDA with NCCL, or the CPU with gloo.

megatron-core assumes a GPU in a few dozen places. :func:`activate` installs CPU stand-ins for the
handful of ``torch.cuda`` functions it calls, once and only when no GPU is used; :func:`cpu_mode`
additionally rewrites ``device="cuda"`` while megatron-core builds modules, buffers and optimizers.
The mode costs time on every torch call, so forward and backward run outside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Platform:
    """The device tensors live on and the ``torch.distributed`` backend that moves them."""

    device: torch.device
    backend: str

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


class _CpuStream:
    """Stand-in for ``torch.cuda.Stream``: on the CPU everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


_CPU_STREAM = _CpuStream()


@contextlib.contextmanager
def _cpu_stream_context(stream: Any) -> Iterator[None]:
    yield


def _cpu_generator_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_generator_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _keep_freed_memory() -> None:
    """Stop glibc from returning every large tensor to the system, only to fault its pages in again.

    A training step allocates the same sizes each time: 7 % of a small model's step, measured.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):  # another C library: keep its own ways
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the most glibc takes
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 256 * 2**20)


def _stand_ins() -> dict[str, Callable[..., Any]]:
    return {
        "current_device": lambda: _CPU,
        "synchronize": lambda device=None: None,
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": _cpu_generator_state,
        "set_rng_state": _set_cpu_generator_state,
        "Stream": _CpuStream,
        "stream": _cpu_stream_context,
        "current_stream": lambda device=None: _CPU_STREAM,
        "default_stream": lambda device=None: _CPU_STREAM,
    }


ORIGINALS: dict[str, Any] = {}
"""PyTorch's and megatron-core's own functions while stand-ins are in their place, by name."""


def _install_stand_ins() -> None:
    if ORIGINALS:
        return
    from megatron.core.tensor_parallel import random as megatron_random

    for name, stand_in in _stand_ins().items():
        ORIGINALS[name] = getattr(torch.cuda, name)
        setattr(torch.cuda, name, stand_in)
    ORIGINALS["_get_cuda_rng_state"] = megatron_random._get_cuda_rng_state
    ORIGINALS["_set_cuda_rng_state"] = megatron_random._set_cuda_rng_state
    megatron_random._get_cuda_rng_state = _cpu_generator_state
    megatron_random._set_cuda_rng_state = _set_cpu_generator_state


def activate(backend: str = "auto", local_rank: int = 0) -> Platform:
    """Choose the platform and make megatron-core ready for it; calling it again changes nothing.

    ``backend`` is ``auto`` (NCCL when a GPU is there), ``nccl`` or ``gloo`` (the CPU, GPU or not).
    """
    if backend != "gloo" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl")
    _install_stand_ins()
    _keep_freed_memory()
    return Platform(_CPU, "gloo")


def use_deterministic_algorithms() -> None:
    """The same bits from the same inputs, every time on the same GPUs: torch raises where an
    operation cannot give them. To be called before CUDA and NCCL start: cuBLAS and NCCL read their
    choices then (as in Megatron, the user's own are kept)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds faults, costs time


def _on_cpu(device: Any) -> Any:
    is_cuda = isinstance(device, str | torch.device) and torch.device(device).type == "cuda"
    return _CPU if is_cuda else device


_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices to the CPU; ``Tensor.type()`` answers the CUDA name megatron-core
    compares."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(
                _on_cpu(arg) if isinstance(arg, str | torch.device) else arg for arg in args
            )
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        return func(*args, **kwargs)


def cpu_mode() -> contextlib.AbstractContextManager[Any]:
    """Context for megatron-core calls that name ``cuda`` literally; does nothing on a GPU."""
    return _CudaMeansCpu() if ORIGINALS else contextlib.nullcontext()
