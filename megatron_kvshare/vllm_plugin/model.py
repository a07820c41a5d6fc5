"""vLLM's Llama with layers that read the KV cache of an earlier one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.vllm_plugin.configuration import ServedConfig
from megatron_kvshare.vllm_plugin.rules import (
    keeps_all_tokens,
    rope_parameters,
    sharing_of,
    target_name,
)


class KVShareAttention(nn.Module):
    """Attention of one layer: a producer projects and caches keys and values, a consumer projects
    queries only and is pointed at the cache of its source."""

    def __init__(
        self,
        config: ServedConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None,
        cache_config: CacheConfig | None,
        prefix: str,
        **of_other_llamas: Any,
    ) -> None:
        """``of_other_llamas``: biases and the like, which :class:`Verify` has found to be off."""
        super().__init__()
        layer, sharing = extract_layer_index(prefix), sharing_of(config)
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads = num_heads // ranks, max(1, num_kv_heads // ranks)
        width = config.head_dim
        linear = {"bias": False, "quant_config": quant_config}
        self.is_producer = sharing.is_producer(layer)
        if self.is_producer:
            self.sizes = [heads * width, kv_heads * width, kv_heads * width]
            self.qkv_proj = QKVParallelLinear(
                hidden_size,
                width,
                num_heads,
                num_kv_heads,
                prefix=f"{prefix}.qkv_proj",
                **linear,
            )
        else:
            self.q_proj = ColumnParallelLinear(
                hidden_size, num_heads * width, prefix=f"{prefix}.q_proj", **linear
            )
        self.o_proj = RowParallelLinear(
            num_heads * width, hidden_size, prefix=f"{prefix}.o_proj", **linear
        )
        self.rotary_emb = get_rope(
            width,
            max_position=max_position_embeddings,
            rope_parameters=rope_parameters(config.rope_parameters),
        )
        self.attn = Attention(
            heads,
            width,
            width**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.kv_window_size if sharing.windowed[layer] else None,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=target_name(sharing, layer, prefix),
        )
        if keeps_all_tokens(sharing, layer):
            # Asked for its cache, the layer then wants one of every token; its own attention has
            # been told of the window above.
            self.attn.sliding_window = None

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.is_producer:
            qkv, _ = self.qkv_proj(hidden_states)
            query, key, value = qkv.split(self.sizes, dim=-1)
            query, key = self.rotary_emb(positions, query, key)
        else:
            # Without keys a backend that does not read them from the cache fails, instead of
            # computing with wrong ones.
            query, key, value = self.q_proj(hidden_states)[0], None, None
            query, _ = self.rotary_emb(positions, query, None)
        return self.o_proj(self.attn(query, key, value))[0]


class KVShareForCausalLM(LlamaForCausalLM):
    """An export of an acyclic map."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer_type = partial(LlamaDecoderLayer, attn_layer_type=KVShareAttention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.model.hf_to_vllm_mapper = _names_in_files(sharing_of(self.config))


def _names_in_files(sharing: SharingMap) -> WeightsMapper:
    """Which projections are kept together; the queries of a consumer stand alone."""
    stacked: dict[str, tuple[str, Any]] = {
        f"layers.{layer}.self_attn.{part}_proj.": (f"layers.{layer}.self_attn.qkv_proj.", part)
        for layer in sharing.producers
        for part in "qkv"
    }
    stacked |= {".gate_proj.": (".gate_up_proj.", 0), ".up_proj.": (".gate_up_proj.", 1)}
    return WeightsMapper(orig_to_new_stacked=stacked)
