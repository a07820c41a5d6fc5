"""Pretraining with cross-layer KV sharing on megatron-core.

Importing the package is cheap: torch and megatron-core are imported by the modules that need them.
"""

from __future__ import annotations

__version__ = "0.1.0"
