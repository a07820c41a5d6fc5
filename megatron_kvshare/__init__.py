"""Pretraining with cross-layer KV sharing on megatron-core.

Importing the package is cheap: torch and megatron-core are imported by the modules that need them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are asked for."""
    if name == "load_model":
        return importlib.import_module("megatron_kvshare.evaluation.api").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
