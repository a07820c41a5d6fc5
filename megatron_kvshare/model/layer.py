"""One decoder layer: attention over own or shared keys and values, then SwiGLU."""

from __future__ import annotations

import torch
from torch import nn

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.megatron_api.layers import TransformerConfig
from megatron_kvshare.model.attention import SharedKVAttention
from megatron_kvshare.model.context import Readable, VisitContext
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV, KVBlocks
from megatron_kvshare.model.mlp import SwiGLU
from megatron_kvshare.model.specs import layer_spec


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
        spec = layer_spec(model.transformer_impl)
        norm = (
            config.hidden_size,
            model.norm_epsilon,
            config.params_dtype,
            config.sequence_parallel,
        )
        self.input_layernorm = spec.norm(*norm)
        recompute_core = model.recompute_granularity == "selective"
        self.self_attention = SharedKVAttention(
            layer, is_producer, heads, spec, config, recompute_core
        )
        self.post_attention_layernorm = spec.norm(*norm)
        self.mlp = SwiGLU(spec, config)

    def forward(
        self, hidden: torch.Tensor, context: VisitContext, source: Readable | KVBlocks
    ) -> tuple[torch.Tensor, KV | None]:
        """Hidden states and the KV to read -> hidden states and the KV this layer produces."""
        attended, own = self.self_attention(self.input_layernorm(hidden), context, source)
        return self.feed_forward(hidden + attended), own

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer without attention: what it does while there is nothing to attend to."""
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def key_values(self, hidden: torch.Tensor, context: VisitContext) -> KV:
        """The layer's keys and values alone: what a sweep needs of its top layer."""
        return self.self_attention.key_values(self.input_layernorm(hidden), context)

    def read_own(self, hidden: torch.Tensor, context: VisitContext, own: KVBlocks) -> torch.Tensor:
        """The rest of the layer, when its keys and values are there already."""
        attended = self.self_attention.read_own(self.input_layernorm(hidden), context, own)
        return self.feed_forward(hidden + attended)
