"""The stack of layers (L3): routes keys and values by the map, runs the passes of a plan.

The plan (:mod:`megatron_kvshare.sharing.plan`) is data and decides everything: which layers run,
how often, how much of them, and under which passes gradients are kept. Source: arXiv 2410.14442,
section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.megatron_api.layers import TransformerConfig
from megatron_kvshare.model.context import SequenceContext
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV, KVBundle, residual
from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.model.specs import layer_spec
from megatron_kvshare.sharing.plan import ExecutionPlan, LayerStep, Segment, StepMode, Sweep


class SweepOutput(NamedTuple):
    """Hidden states ``[s, b, h]`` after the last full layer, and the KV of the producers that
    ran."""

    hidden: torch.Tensor
    produced: KVBundle


class BlockOutput(NamedTuple):
    """``residuals``: one row per cyclic group, see :func:`megatron_kvshare.model.kv.residual`."""

    hidden: torch.Tensor
    residuals: torch.Tensor | None


class SharedKVBlock(nn.Module):
    """All decoder layers and the final norm."""

    def __init__(
        self,
        plan: ExecutionPlan,
        heads: HeadLayout,
        model: ModelConfig,
        config: TransformerConfig,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.heads = heads
        self.layers = nn.ModuleList(
            KVShareLayer(layer, plan.map.is_producer(layer), heads, model, config)
            for layer in range(plan.map.num_layers)
        )
        self.final_layernorm = layer_spec(model.transformer_impl).norm(
            config.hidden_size, model.norm_epsilon, config.params_dtype, config.sequence_parallel
        )
        self.recompute = RecomputePolicy.of(model)

    def forward(
        self, hidden: torch.Tensor, context: SequenceContext, measure_residual: bool = False
    ) -> BlockOutput:
        """``[s, b, h]`` embeddings -> normed ``[s, b, h]``."""
        shared: dict[int, KV] = {}
        residuals = []
        for segment in self.plan.segments:
            hidden, produced, before = self._run_segment(segment, hidden, shared, context)
            if measure_residual and segment.is_cyclic:
                residuals.append(residual(produced, before, segment.targets))
            shared.update(produced)
        measured = torch.stack(residuals) if residuals else None
        return BlockOutput(self.final_layernorm(hidden), measured)

    def _run_segment(
        self, segment: Segment, hidden: torch.Tensor, shared: KVBundle, context: SequenceContext
    ) -> tuple[torch.Tensor, KVBundle, KVBundle]:
        """All sweeps, each from the same input; the last sweep's output and the two last KV
        bundles."""
        before: KVBundle = {}
        output = SweepOutput(hidden, {})
        for sweep in segment.sweeps:
            before = output.produced
            with torch.set_grad_enabled(sweep.gradient and torch.is_grad_enabled()):
                output = self._run_sweep(sweep, hidden, shared, before, context)
        return *output, before

    def _run_sweep(
        self,
        sweep: Sweep,
        hidden: torch.Tensor,
        shared: KVBundle,
        before: KVBundle,
        context: SequenceContext,
    ) -> SweepOutput:
        """One pass. ``shared``: KV from below the segment; ``before``: KV of the previous pass."""
        produced: dict[int, KV] = {}

        def run(steps: tuple[LayerStep, ...], hidden: torch.Tensor) -> SweepOutput:
            fresh: dict[int, KV] = {}
            for step in steps:
                source = self._source(step, {**shared, **produced, **fresh}, before)
                if source is None and self._reads_nothing_yet(step):
                    source = self._zero_kv(hidden, context)
                hidden, own = self._run_step(step, hidden, source, context)
                if own is not None:
                    fresh[step.layer] = own
            return SweepOutput(hidden, fresh)

        for steps, recomputed in self.recompute.chunks(sweep.steps):
            if recomputed and torch.is_grad_enabled():
                output = checkpoint(
                    run, steps, hidden, use_reentrant=False, preserve_rng_state=False
                )
            else:
                output = run(steps, hidden)
            hidden = output.hidden
            produced.update(output.produced)
        return SweepOutput(hidden, produced)

    def _source(self, step: LayerStep, now: KVBundle, before: KVBundle) -> KV | None:
        """The KV a consumer reads: an upward layer's comes from the previous pass."""
        sharing, layer = self.plan.map, step.layer
        if sharing.is_producer(layer) or step.mode is not StepMode.FULL:
            return None
        return (before if sharing.is_upward(layer) else now).get(sharing.sources[layer])

    def _reads_nothing_yet(self, step: LayerStep) -> bool:
        """An upward layer of the first pass in a plan that does not skip its attention."""
        return step.mode is StepMode.FULL and self.plan.map.is_upward(step.layer)

    def _zero_kv(self, hidden: torch.Tensor, context: SequenceContext) -> KV:
        shape = (context.rotary.cos.shape[-2], hidden.shape[1], self.heads.local_kv_heads)
        return KV(*hidden.new_zeros(2, *shape, self.heads.head_dim).unbind())

    def _run_step(
        self, step: LayerStep, hidden: torch.Tensor, source: KV | None, context: SequenceContext
    ) -> tuple[torch.Tensor, KV | None]:
        layer = self.layers[step.layer]
        if step.mode is StepMode.KV_ONLY:
            return hidden, layer.key_values(hidden, context)
        if step.mode is StepMode.NO_ATTENTION:
            # As a node of its own, so that backward adds gradients in the order of a full layer.
            return layer.feed_forward(hidden.view_as(hidden)), None
        return layer(hidden, context, source)


class RecomputePolicy(NamedTuple):
    """Which layers are recomputed in backward (``--recompute-granularity full``), in which
    chunks."""

    layers_per_chunk: int
    recomputed_layers: int

    @classmethod
    def of(cls, model: ModelConfig) -> RecomputePolicy:
        if model.recompute_granularity != "full":
            return cls(model.num_layers, 0)
        if model.recompute_method == "block":
            return cls(1, model.recompute_num_layers or model.num_layers)
        return cls(model.recompute_num_layers or 1, model.num_layers)

    def chunks(self, steps: tuple[LayerStep, ...]) -> Iterator[tuple[tuple[LayerStep, ...], bool]]:
        """Consecutive steps that run as one unit, and whether that unit is recomputed."""
        inside = [step for step in steps if step.layer < self.recomputed_layers]
        for start in range(0, len(inside), self.layers_per_chunk):
            yield tuple(inside[start : start + self.layers_per_chunk]), True
        if len(inside) < len(steps):
            yield steps[len(inside) :], False
