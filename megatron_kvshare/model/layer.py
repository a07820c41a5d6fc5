"""One decoder layer: attention over own or shared keys and values, then SwiGLU."""

from __future__ import annotations

import torch
from torch import nn

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.megatron_api.layers import TransformerConfig
from megatron_kvshare.model.attention import SharedKVAttention
from megatron_kvshare.model.context import VisitContext
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV
from megatron_kvshare.model.kv_view import AnyView, View
from megatron_kvshare.model.modules import SwiGLU, add_and_norm, build_norm, layer_spec


class KVShareLayer(nn.Module):
    """Pre-norm residual layer. Hidden states are ``[s, b, h]``."""

    def __init__(
        self,
        layer: int,
        is_producer: bool,
        heads: HeadLayout,
        model: ModelConfig,
        config: TransformerConfig,
    ) -> None:
        super().__init__()
        spec = layer_spec(model)
        self.input_layernorm = build_norm(model, config)
        recompute_core = model.recompute_granularity == "selective"
        self.self_attention = SharedKVAttention(
            layer, is_producer, heads, spec, config, recompute_core
        )
        self.post_attention_layernorm = build_norm(model, config)
        self.mlp = SwiGLU(spec, config)

    def forward(self, hidden: torch.Tensor, view: AnyView) -> tuple[torch.Tensor, AnyView]:
        """Hidden states and the keys and values known so far -> both, after this layer."""
        attended, view = self.self_attention(self.input_layernorm(hidden), view)
        return self.feed_forward(hidden, attended), view

    def feed_forward(
        self, hidden: torch.Tensor, attended: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer after its attention; without any it does this while there is nothing to attend
        to."""
        if attended is None:
            return hidden + self.mlp(self.post_attention_layernorm(hidden))
        hidden, normed = add_and_norm(self.post_attention_layernorm, hidden, attended)
        return hidden + self.mlp(normed)

    def key_values(self, hidden: torch.Tensor, context: VisitContext) -> KV:
        """The layer's keys and values alone: what a sweep needs of its top layer."""
        return self.self_attention.key_values(self.input_layernorm(hidden), context)

    def read_own(self, hidden: torch.Tensor, view: View) -> torch.Tensor:
        """The rest of the layer, when its keys and values are there already."""
        attended = self.self_attention.read_own(self.input_layernorm(hidden), view)
        return self.feed_forward(hidden, attended)
