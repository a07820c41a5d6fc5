"""The only package that imports ``megatron.core``.

Version differences and the CPU backend live here, so that the rest of the code reads as plain
PyTorch.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

# megatron-core announces at import that optional GPU packages are missing (`kvshare doctor` says it
# once, with what they would bring) and its distributed optimizer asks views for gradients.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=_message)


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stands for ``torch.compile``, as a decorator with or without arguments."""
    return _as_it_is if function is None else function


def _import_without_compiler() -> None:
    """megatron-core compiles small functions with ``torch.compile`` where it defines them.

    Without a GPU that would load a compiler, half of the time the import takes, and need a C++
    compiler where it is used. Its own switch is inside the package, so it comes too late.
    """
    compiler, torch.compile = torch.compile, _as_it_is
    try:
        from megatron.core import jit
    finally:
        torch.compile = compiler
    jit.disable_jit_fuser()


if not torch.cuda.is_available():
    _import_without_compiler()
