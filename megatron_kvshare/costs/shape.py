"""The sizes of a model, with Megatron's names (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that costs depend on, with Megatron's names. Attention windows are in tokens."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    seq_length: int
    window_size: int | None = None
    tied_embeddings: bool = True

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of the keys (and of the values) of one layer."""
        return self.num_query_groups * self.kv_channels
