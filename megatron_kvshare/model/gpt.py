"""The language model (L3): embedding, shared-KV decoder, output head, loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from megatron_kvshare.config import ModelConfig, ParallelConfig
from megatron_kvshare.megatron_api.layers import (
    ColumnParallel,
    VocabEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.megatron_api.platform import cpu_mode
from megatron_kvshare.megatron_api.transformer_config import transformer_config
from megatron_kvshare.model.block import SharedKVBlock
from megatron_kvshare.model.context import sequence_contexts
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.visibility import SequenceLayout
from megatron_kvshare.sharing.plan import ExecutionPlan


class ModelOutput(NamedTuple):
    """``value``: fp32 loss per token ``[b, s]``, or logits ``[b, s, vocab / tp]`` without labels.

    ``residuals``: this rank's fp64 sums ``[groups, sweeps, 2]`` of
    :func:`megatron_kvshare.model.kv.residual`, or None.
    """

    value: torch.Tensor
    residuals: torch.Tensor | None


class KVShareGPT(nn.Module):
    """A decoder for one tensor-parallel rank. ``plan`` carries the sharing map and its passes.

    Weights are uninitialised memory until :func:`megatron_kvshare.model.parameters.initialize` or a
    checkpoint fills them. ``vocab_size`` is the true one; rows beyond it are padding that never
    enters the softmax.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        plan: ExecutionPlan,
        vocab_size: int,
        state: ParallelState,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        device = state.platform.device
        self.config = transformer_config(model, parallel, device)
        self.model_config = model
        self.plan = plan
        self.vocab_size = vocab_size
        self.window_size = window_size
        self.heads = HeadLayout.of(model, state.tp_rank, state.tp_size)
        padded = model.padded_vocab_size(state.tp_size, vocab_size)
        tied = not model.untie_embeddings_and_output_weights
        with cpu_mode(), device:
            self.embedding = VocabEmbedding(padded, model.hidden_size, self.config)
            self.decoder = SharedKVBlock(
                plan.map, self.heads, model, self.config, state.sum_over_ranks
            )
            self.output_layer = ColumnParallel(
                model.hidden_size, padded, self.config, own_weight=not tied
            )
        local_rows = padded // state.tp_size
        self.true_columns = min(max(vocab_size - state.tp_rank * local_rows, 0), local_rows)

    def forward(
        self,
        token_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        measure_residual: bool = False,
        plan: ExecutionPlan | None = None,
    ) -> ModelOutput:
        """Tokens, labels, positions and documents are ``[b, s]`` integers.

        ``position_ids`` None means 0..s-1. Tokens of different ``document_ids`` do not see each
        other. ``plan``: another plan of the same map than the model's own.
        """
        hidden = self.embedding(token_ids)
        layout = SequenceLayout(token_ids.shape[1], token_ids.device, document_ids)
        contexts = sequence_contexts(
            self.model_config, self.plan.map, self.window_size, layout, position_ids, hidden.dtype
        )
        output = self.decoder(hidden, contexts, plan or self.plan, measure_residual)
        logits = self._logits(output.hidden)
        if labels is None:
            return ModelOutput(logits.transpose(0, 1).contiguous().float(), output.residuals)
        loss = vocab_parallel_cross_entropy(logits, labels.t().contiguous())
        return ModelOutput(loss.t(), output.residuals)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[s, b, h] -> [s, b, vocab / tp]``; padded columns are -inf."""
        own = self.output_layer.weight
        logits = self.output_layer.project(hidden, self.embedding.weight if own is None else own)
        if self.true_columns < logits.shape[-1]:
            logits[..., self.true_columns :] = float("-inf")
        return logits

    def set_input_tensor(self, input_tensor: object) -> None:
        """Called by megatron-core's schedules; the whole model sits in one stage and embeds its own
        input."""
