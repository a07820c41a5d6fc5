"""The stack of layers: hidden states from bottom to top, keys and values by the map.

The plan (:mod:`megatron_kvshare.sharing.plan`) is data and decides everything: which layers run,
how often, how much of them, for which tokens, and under which sweeps gradients are kept. Cyclic
groups, whose layers read above themselves, run by the sweeps of
:mod:`megatron_kvshare.model.sweep`; all others one after another. Source: arXiv 2410.14442,
section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.megatron_api.layers import TransformerConfig
from megatron_kvshare.model.context import SequenceContexts, VisitContext
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV
from megatron_kvshare.model.kv_view import KVView
from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.model.modules import build_norm
from megatron_kvshare.model.recompute import RecomputePolicy, recomputed
from megatron_kvshare.model.sweep import SumOverRanks, SweepRunner
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan, LayerStep, StepMode
from megatron_kvshare.stages.placement import Stage


class StageTensors(NamedTuple):
    """What crosses a cut between pipeline stages: hidden states ``[s, b, h]``, and keys and values
    that layers above the cut read, by producer."""

    hidden: torch.Tensor
    kv: Mapping[int, KV]


class BlockOutput(NamedTuple):
    """``leaving.kv``: all that is known here and that other layers read.

    ``residuals``: one row per sweep of each cyclic group, see
    :func:`megatron_kvshare.model.kv.residual`: ``[groups, most sweeps, 2]``, 0 for a sweep that
    did not run here."""

    leaving: StageTensors
    residuals: torch.Tensor | None


class SharedKVBlock(nn.Module):
    """The decoder layers of one pipeline stage, and on the last one the final norm.

    ``layers[i]`` is layer ``stage.first + i`` of the model.
    """

    def __init__(
        self,
        sharing: SharingMap,
        stage: Stage,
        heads: HeadLayout,
        model: ModelConfig,
        config: TransformerConfig,
        sum_over_ranks: SumOverRanks,
    ) -> None:
        super().__init__()
        self.sharing = sharing
        self.stage = stage
        self.heads = heads
        self.layers = nn.ModuleList(
            KVShareLayer(layer, sharing.is_producer(layer), heads, model, config)
            for layer in stage.layers
        )
        self.final_layernorm = build_norm(model, config) if stage.predicts else None
        self.recompute = RecomputePolicy.of(model, stage.layers)
        self.sum_over_ranks = sum_over_ranks

    def forward(
        self,
        entering: StageTensors,
        contexts: SequenceContexts,
        plan: ExecutionPlan,
        measure_residual: bool = False,
        keep_kv: bool = False,
    ) -> BlockOutput:
        """Embeddings or what the stage below made -> the same above, by a plan of this block's map;
        ``keep_kv``: with the keys and values of every producer, read by others or not."""
        assert plan.map == self.sharing, "the plan is for another map"
        hidden, kv = entering
        measured = measure_residual and bool(plan.groups)
        residuals = plan_residuals(plan, hidden.device) if measured else None
        for segment in plan.within(self.stage.layers):
            if segment.is_cyclic:
                hidden, kv, rows = self.sweeps.run_group(
                    segment, hidden, kv, contexts, measured, keep_kv
                )
                if residuals is not None:
                    residuals[plan.groups.index(segment), : len(rows)] = torch.stack(rows)
                continue
            for steps, again in self.recompute.chunks(segment.only_visit.steps):
                run = recomputed(self.run_layers, again)
                hidden, kv = run(steps, hidden, kv, contexts.whole, keep_kv)
        return BlockOutput(StageTensors(hidden, kv), residuals)

    def run_layers(
        self,
        steps: tuple[LayerStep, ...],
        hidden: torch.Tensor,
        kv: Mapping[int, KV],
        context: VisitContext,
        keep_kv: bool = False,
    ) -> tuple[torch.Tensor, Mapping[int, KV]]:
        """Layers from bottom to top, as much of each as its step asks for, once for all tokens."""
        view = KVView.of_all_tokens(kv, context)
        for step in steps:
            layer = self.layers[step.layer - self.stage.first]
            if step.mode is StepMode.KV_ONLY:
                view = view.with_own(step.layer, layer.key_values(hidden, context))
                continue
            hidden, view = layer(hidden, view)
            if not (keep_kv or self.sharing.consumers_of(step.layer)):
                view = view.without(step.layer)
        return hidden, view.whole()

    @cached_property
    def sweeps(self) -> SweepRunner:
        """Runs cyclic groups, or parts of them, over the layers of this stage."""
        layers = dict(zip(self.stage.layers, self.layers, strict=True))
        return SweepRunner(layers, self.sharing, self.heads, self.recompute, self.sum_over_ranks)


def plan_residuals(plan: ExecutionPlan, device: torch.device) -> torch.Tensor:
    """Zeros, to be filled with the residuals of a plan's cyclic groups."""
    size = (len(plan.groups), plan.most_sweeps, 2)
    return torch.zeros(size, dtype=torch.float64, device=device)
