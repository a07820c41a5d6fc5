"""Kinds of stretched rotary embeddings: which settings each reads, and their names in a Hugging
Face configuration. One table for flags, identities of checkpoints, imports and exports; the
formulas are in ``model/rotary.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_kvshare.config.fields.model import ModelConfig

_FACTOR = {"rope_scaling_factor": "factor"}
_ORIGINAL = {"rope_original_max_positions": "original_max_position_embeddings"}
ROPE_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "llama3": {
        **_FACTOR,
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        **_ORIGINAL,
    },
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "yarn": {
        **_FACTOR,
        **_ORIGINAL,
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        "yarn_mscale": "mscale",
        "yarn_mscale_all_dim": "mscale_all_dim",
        "yarn_attention_factor": "attention_factor",
        "yarn_correction_range_round_to_int": "truncate",
    },
}
"""By the name that transformers gives each kind: our setting -> theirs."""


def rope_identity(model: ModelConfig) -> dict[str, Any]:
    """What of it weights belong to. Llama 3's has the form that it had before there were others."""
    kind = model.rope_scaling
    identity: dict[str, Any] = {"use_rope_scaling": kind == "llama3"}
    if kind is None:
        return identity
    if kind != "llama3":
        identity["rope_scaling_type"] = kind
    if kind == "dynamic":  # stretches what is longer than this
        identity["max_position_embeddings"] = model.max_positions
    return identity | {name: getattr(model, name) for name in ROPE_SETTINGS[kind]}
