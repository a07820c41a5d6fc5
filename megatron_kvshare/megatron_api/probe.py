"""Does megatron-core work on this machine? Questions that ``kvshare doctor`` asks.

Everything is imported inside the functions: the doctor also runs where torch is missing.
"""

from __future__ import annotations

import importlib.util


def cpu_backend_fault() -> str | None:
    """Try the CPU backend (gloo and the stand-ins for ``torch.cuda``); return what is wrong."""
    try:
        import torch.distributed as dist

        from megatron_kvshare.megatron_api import platform

        if not dist.is_available() or not dist.is_gloo_available():
            return "this build of torch has no gloo"
        platform.activate("gloo")
    except Exception as error:  # whatever a broken installation raises is the answer
        return f"{type(error).__name__}: {error}"
    return None


def dataset_helpers_compiled() -> bool:
    """True when the wheel brought megatron-core's dataset helpers compiled: no compiler needed."""
    try:
        return importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    except Exception:  # a parent package that cannot be imported
        return False
