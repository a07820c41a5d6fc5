"""Kinds of stretched rotary embeddings: which settings each reads, and their names in a Hugging
Face configuration. One table for flags, identities of checkpoints, imports and exports; the
formulas are in ``model/rotary.py``."""

from __future__ import annotations

from collections.abc import Mapping

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
