"""Settings that had another name: command lines and files that use it go on working."""

from __future__ import annotations

RENAMED = {
    "kv_forward_passes": "kv_forward_sweeps",
    "kv_backward_passes": "kv_backward_sweeps",
    "kv_min_passes": "kv_min_sweeps",
    "kv_max_passes": "kv_max_sweeps",
}
"""Earlier names and those of today."""
