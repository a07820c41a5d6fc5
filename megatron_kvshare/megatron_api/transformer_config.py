"""From this project's configuration to megatron-core's ``TransformerConfig``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kvshare.config import ModelConfig, ParallelConfig
from megatron_kvshare.megatron_api.platform import cpu_mode

# The default of this field, whose name depends on the version, warns that it is deprecated.
_GRAPH_FIELDS = ("cuda_graph_modules", "cuda_graph_scope")
_NO_CUDA_GRAPHS: dict[str, Any] = {
    next(name for name in _GRAPH_FIELDS if name in TransformerConfig.__dataclass_fields__): []
}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, device: torch.device, virtual_stages: int = 1
) -> TransformerConfig:
    """The settings megatron-core's linear layers, DDP, schedules and optimizer read.

    Weights are initialised by :mod:`megatron_kvshare.model.parameters` (``perform_initialization``
    is off) and gradients are normalised by the tokens of the global batch
    (``calculate_per_token_loss``), so that neither depends on the layout. ``num_query_groups``
    stays unset: attention and its KV heads are ours.
    """
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    with cpu_mode():
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            kv_channels=model.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=model.norm_epsilon,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=model.bf16,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel
            and parallel.tensor_model_parallel_size > 1,
            perform_initialization=False,
            use_cpu_initialization=device.type == "cpu",
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            calculate_per_token_loss=True,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
            # Batched, two ranks that are each other's previous and next mix up the directions.
            batch_p2p_comm=parallel.pipeline_model_parallel_size != 2,
            **_NO_CUDA_GRAPHS,
        )
