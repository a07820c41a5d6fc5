"""Models by name (no torch)."""

from __future__ import annotations

SHAPES: dict[str, dict[str, int | bool]] = {
    "small": {
        "num_layers": 12,
        "hidden_size": 256,
        "ffn_hidden_size": 688,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": 4096,
        "untie_embeddings_and_output_weights": True,
    },
    "110m": {
        "num_layers": 12,
        "hidden_size": 768,
        "ffn_hidden_size": 2048,
        "num_attention_heads": 12,
        "num_query_groups": 6,
        "vocab_size": 32000,
    },
    "1b": {
        "num_layers": 22,
        "hidden_size": 2048,
        "ffn_hidden_size": 5632,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "vocab_size": 32000,
        "untie_embeddings_and_output_weights": True,
    },
}
"""110m and 1b are those of examples/configs, with Llama's vocabulary."""
