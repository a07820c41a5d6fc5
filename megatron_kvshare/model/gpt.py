"""The language model: embedding, shared-KV decoder, output head, loss; or one pipeline stage
of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.megatron_api.layers import VocabEmbedding
from megatron_kvshare.megatron_api.loss import OutputHead, TokenLosses
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.megatron_api.platform import cpu_mode
from megatron_kvshare.megatron_api.transformer_config import transformer_config
from megatron_kvshare.model.block import SharedKVBlock, StageTensors
from megatron_kvshare.model.context import SequenceContexts, sequence_contexts
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.visibility import SequenceLayout
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.stages.placement import Placement, Stage


class ModelOutput(NamedTuple):
    """``value``: logits ``[b, s, vocab / tp]``, or with labels the fp32 loss of every token
    ``[b, s]``, without gradient; ``loss``: the sum over those that count, for backward. Both are
    None below the last pipeline stage. ``leaving``: what the next stage needs, None on the last.

    ``residuals``: this rank's fp64 sums ``[groups, sweeps, 2]`` of
    :func:`megatron_kvshare.model.kv.residual`, or None.
    """

    value: torch.Tensor | None
    residuals: torch.Tensor | None
    leaving: StageTensors | None = None
    loss: torch.Tensor | None = None


class KVShareGPT(nn.Module):
    """A decoder for one tensor-parallel rank. ``plan`` carries the sharing map and its sweeps;
    ``stage`` the part of the model that is here (left out: all of it).

    Weights are uninitialised memory until :func:`megatron_kvshare.model.parameters.initialize` or a
    checkpoint fills them. Rows beyond the true vocabulary are padding that never enters the
    softmax.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parallel: ParallelConfig,
        plan: ExecutionPlan,
        state: ParallelState,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        assert plan.map == spec.map, "the plan is one of another map"
        model, vocab_size = spec.model, spec.vocab_size
        self.stage = stage or Placement.whole(plan.map).stages[0]
        device = state.platform.device
        self.config = transformer_config(model, parallel, device, self.stage.chunks)
        self.spec = spec
        self.plan = plan
        self.heads = HeadLayout.of(model, state.tp_rank, state.tp_size)
        padded = model.padded_vocab_size(state.tp_size, vocab_size)
        tied = not model.untie_embeddings_and_output_weights
        # The names megatron-core's gradient reduction looks for: a tied head on another stage than
        # the embedding is a copy, kept equal by adding both gradients.
        self.pre_process, self.post_process = self.stage.embeds, self.stage.predicts
        self.share_embeddings_and_output_weights = tied
        head_is_copy = tied and not self.stage.embeds
        local_rows = padded // state.tp_size
        true_columns = min(max(vocab_size - state.tp_rank * local_rows, 0), local_rows)
        with cpu_mode(), device:
            self.embedding = None
            if self.stage.embeds:
                self.embedding = VocabEmbedding(padded, model.hidden_size, self.config)
            self.decoder = SharedKVBlock(
                plan.map, self.stage, self.heads, model, self.config, state.sum_over_ranks
            )
            self.output_layer = None
            if self.stage.predicts:
                own = not tied or head_is_copy
                self.output_layer = OutputHead(
                    model.hidden_size,
                    padded,
                    self.config,
                    true_columns,
                    tied=None if own else partial(getattr, self.embedding, "weight"),
                )
        if tied and self.stage.embeds != self.stage.predicts:
            weight = self.shared_embedding_or_output_weight()
            weight.shared_embedding = True  # type: ignore[attr-defined]
            weight.shared = head_is_copy  # type: ignore[attr-defined]  # counted once in the norm
        for weight in spec.weights_on(self.stage):
            held_in = self.get_parameter(weight.parameter_on(self.stage))
            held_in.decays = weight.decays  # type: ignore[attr-defined]  # read by the optimizer

    def forward(
        self,
        token_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        measure_residual: bool = False,
        plan: ExecutionPlan | None = None,
        entering: StageTensors | None = None,
        counted: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Tokens, labels, positions and documents are ``[b, s]`` integers; ``counted`` ``[b, s]``
        says which tokens the loss counts (None: all).

        ``position_ids`` None means 0..s-1. Tokens of different ``document_ids`` do not see each
        other. ``plan``: another plan of the same map than the model's own. ``entering``: what the
        stage below made, for all stages but the first.
        """
        if self.embedding is not None:
            entering = StageTensors(self.embedding(token_ids), {})
        assert entering is not None, "this pipeline stage needs what the one below made"
        contexts = self.contexts(token_ids, position_ids, document_ids)
        output = self.decoder(entering, contexts, plan or self.plan, measure_residual)
        if self.output_layer is None:
            return ModelOutput(None, output.residuals, output.leaving)
        hidden = output.leaving.hidden
        if labels is None:
            return ModelOutput(self.logits(hidden), output.residuals)
        losses = self.losses(hidden, labels, counted)
        return ModelOutput(losses.each, output.residuals, loss=losses.total)

    def contexts(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> SequenceContexts:
        """Positions and visibility of a batch, for all layers."""
        layout = SequenceLayout(
            token_ids.shape[1], token_ids.device, self.config.params_dtype, document_ids
        )
        return sequence_contexts(self.spec, layout, position_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Norm and head: ``[s, b, h]`` -> fp32 ``[b, s, vocab / tp]``; padded columns are -inf."""
        head, normed = self._head(hidden)
        logits: torch.Tensor = head(normed)
        return logits.transpose(0, 1).contiguous().float()

    def losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor | None = None
    ) -> TokenLosses:
        """Norm, head and loss of ``[s, b, h]``; ``labels``, ``counted`` (None: all) ``[b, s]``."""
        head, normed = self._head(hidden)
        losses: TokenLosses = head(normed, labels, counted)
        return losses

    def _head(self, hidden: torch.Tensor) -> tuple[OutputHead, torch.Tensor]:
        """The head, and what enters it."""
        assert self.output_layer is not None and self.decoder.final_layernorm is not None
        return self.output_layer, self.decoder.final_layernorm(hidden)

    @property
    def copies(self) -> frozenset[str]:
        """Parameters that repeat one of another stage: a tied head apart from the embedding."""
        owns = self.output_layer is not None and self.output_layer.weight is not None
        tied = self.share_embeddings_and_output_weights
        return frozenset({"output_layer.weight"} if tied and owns else ())

    def shared_embedding_or_output_weight(self) -> nn.Parameter:
        """The weight of embedding and tied head that is on this stage, for megatron-core."""
        owner = self.embedding or self.output_layer
        assert owner is not None, "neither embedding nor head is on this stage"
        weight: nn.Parameter = owner.weight
        return weight


def build_stages(
    spec: ModelSpec,
    parallel: ParallelConfig,
    plan: ExecutionPlan,
    stages: Sequence[Stage],
    state: ParallelState,
) -> list[KVShareGPT]:
    """The pipeline stages of one rank, without weights that mean anything."""
    return [KVShareGPT(spec, parallel, plan, state, stage) for stage in stages]
