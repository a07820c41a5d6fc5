"""From settings to what the cost model and the executor work with (L1)."""

from __future__ import annotations

from megatron_kvshare.config.model import ModelConfig, SharingConfig
from megatron_kvshare.config.rules_model import sharing_map
from megatron_kvshare.sharing.cost import ModelShape
from megatron_kvshare.sharing.plan import ExecutionPlan, jacobi_plan


def model_shape(model: ModelConfig, vocab_size: int, window_size: int | None = None) -> ModelShape:
    """The sizes that costs depend on; ``vocab_size`` is the true size, without padding."""
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size or 0,  # always filled in by ModelConfig
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        vocab_size=vocab_size,
        seq_length=model.seq_length,
        window_size=window_size,
        tied_embeddings=not model.untie_embeddings_and_output_weights,
    )


def execution_plan(model: ModelConfig, sharing: SharingConfig) -> ExecutionPlan:
    """The passes that the settings ask for. Raises :class:`MapError`."""
    sweeps = (sharing.kv_forward_passes, sharing.kv_backward_passes)
    return jacobi_plan(sharing_map(model, sharing), *sweeps)
