"""The stack of layers: routes keys and values by the map, runs the sweeps of a plan.

The plan (:mod:`megatron_kvshare.sharing.plan`) is data and decides everything: which layers run,
how often, how much of them, for which tokens, and under which sweeps gradients are kept. Source:
arXiv 2410.14442, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.megatron_api.layers import TransformerConfig
from megatron_kvshare.model.context import Readable, SequenceContexts, VisitContext
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV, KVBlocks, KVState, relative_change, residual
from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.model.specs import layer_spec
from megatron_kvshare.model.sweep import RecomputePolicy, SweepOutput, SweepRunner
from megatron_kvshare.model.tokens import join_tokens, split_tokens
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import Carry, ExecutionPlan, LayerStep, Segment, Sweep
from megatron_kvshare.stages.placement import Stage

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Adds a tensor over all ranks that run this forward together."""


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
        self.final_layernorm = None
        if stage.predicts:
            self.final_layernorm = layer_spec(model.transformer_impl).norm(
                config.hidden_size,
                model.norm_epsilon,
                config.params_dtype,
                config.sequence_parallel,
            )
        self.recompute = RecomputePolicy.of(model, stage.layers)
        self.sum_over_ranks = sum_over_ranks

    def forward(
        self,
        entering: StageTensors,
        contexts: SequenceContexts,
        plan: ExecutionPlan,
        measure_residual: bool = False,
    ) -> BlockOutput:
        """Embeddings or what the stage below made -> the same above, by a plan of this block's
        map: layers one after another, cyclic groups by the sweeps of :class:`_GroupRun`."""
        assert plan.map == self.sharing, "the plan is for another map"
        hidden, kv = entering
        measured = measure_residual and bool(plan.groups)
        residuals = plan_residuals(plan, hidden.device) if measured else None
        for segment in plan.within(self.stage.layers):
            if segment.is_cyclic:
                output = self._sweep(segment, hidden, kv, contexts, measured)
                if residuals is not None and output.residuals is not None:
                    rows = output.residuals
                    residuals[plan.groups.index(segment), : len(rows)] = rows
                hidden, made = output.leaving
                kv = {**kv, **made}
                continue
            for steps, run in self._runs(segment):
                hidden, made = run(steps, hidden, kv, contexts.whole)
                # A new mapping: what a recomputed unit reads must not change after it has run.
                kv = {**kv, **made}
        return BlockOutput(StageTensors(hidden, kv), residuals)

    def run_layers(
        self,
        steps: Sequence[LayerStep],
        hidden: torch.Tensor,
        kv: Mapping[int, KV],
        context: VisitContext,
    ) -> tuple[torch.Tensor, dict[int, KV]]:
        """Layers from bottom to top, each once for all tokens; returns also the keys and values
        that other layers read of them."""
        known, made = dict(kv), {}
        for layer in (step.layer for step in steps):
            source = self.sharing.sources[layer]
            read: Readable | KVBlocks = KVBlocks.unknown(1)
            if source != layer:
                read = context.readable(layer, KVBlocks((known[source],)))
            hidden, own = self.layers[layer - self.stage.first](hidden, context, read)
            if own is not None and self.sharing.consumers_of(layer):
                known[layer] = made[layer] = own
        return hidden, made

    def _runs(self, segment: Segment) -> Iterator[tuple[Sequence[LayerStep], Callable[..., Any]]]:
        """Steps of a segment without sweeps that run as one unit, and :meth:`run_layers`,
        recomputed in backward where that is wanted."""
        (sweep,) = segment.sweeps
        (visit,) = sweep.visits
        for steps, recomputed in self.recompute.chunks(visit.steps):
            if recomputed and torch.is_grad_enabled():
                again = {"use_reentrant": False, "preserve_rng_state": False}
                yield steps, partial(checkpoint, self.run_layers, **again)
            else:
                yield steps, self.run_layers

    @cached_property
    def runner(self) -> SweepRunner:
        """Runs sweeps, or parts of them, over the layers of this stage."""
        layers = dict(zip(self.stage.layers, self.layers, strict=True))
        return SweepRunner(layers, self.sharing, self.heads, self.recompute)

    def _sweep(
        self,
        segment: Segment,
        hidden: torch.Tensor,
        kv: Mapping[int, KV],
        contexts: SequenceContexts,
        measure_residual: bool,
    ) -> BlockOutput:
        """All sweeps of a cyclic group that lies in this stage; ``residuals`` are its own rows."""
        run = _GroupRun(segment, hidden, kv, contexts, self.runner)
        rows = run.all_sweeps(measure_residual, self.sum_over_ranks)
        measured = torch.stack(rows) if rows and measure_residual else None
        return BlockOutput(StageTensors(run.output.hidden, run.leaving()), measured)


def plan_residuals(plan: ExecutionPlan, device: torch.device) -> torch.Tensor:
    """Zeros, to be filled with the residuals of a plan's cyclic groups."""
    size = (len(plan.groups), plan.most_sweeps, 2)
    return torch.zeros(size, dtype=torch.float64, device=device)


class _GroupRun:
    """One cyclic group of one forward: its sweeps one after another, each from the same input."""

    def __init__(
        self,
        segment: Segment,
        hidden: torch.Tensor,
        shared: Mapping[int, KV],
        contexts: SequenceContexts,
        runner: SweepRunner,
    ) -> None:
        self.segment = segment
        self.input = hidden
        self.shared = shared
        self.contexts = contexts
        self.runner = runner
        self.output = SweepOutput(hidden, {}, {})

    def all_sweeps(self, measure: bool, sum_over_ranks: SumOverRanks) -> list[torch.Tensor]:
        """Run what the plan asks for; returns the residual of every sweep, if any is needed."""
        decide = any(sweep.skip_below is not None for sweep in self.segment.sweeps)
        rows, moved = [], math.inf
        for sweep in self.segment.sweeps:
            if sweep.skip_below is not None and moved <= sweep.skip_below:
                rows.append(torch.zeros(2, dtype=torch.float64, device=self.input.device))
                continue
            with torch.set_grad_enabled(sweep.gradient and torch.is_grad_enabled()):
                carried = self._carried(sweep)
                self.output = self._run(sweep, carried)
            if measure or (decide and not sweep.last):
                rows.append(residual(self.output.kv, carried, self.segment.targets))
                if decide and not sweep.last:
                    moved = relative_change(sum_over_ranks(rows[-1].clone()))
        return rows

    def leaving(self) -> dict[int, KV]:
        """Keys and values that layers above the segment read."""
        sharing, last = self.runner.sharing, self.segment.last
        return {
            layer: blocks.whole()
            for layer, blocks in self.output.kv.items()
            if any(reader > last for reader in sharing.consumers_of(layer))
        }

    def _run(self, sweep: Sweep, carried: KVState) -> SweepOutput:
        mine, every = self.input.shape[0], self.contexts.whole.num_tokens
        assert mine == every or mine % sweep.stride == 0, "a rank's tokens are no whole subsets"
        outside = {layer: KVBlocks.of(kv, sweep.stride) for layer, kv in self._outside().items()}
        # Whole blocks of memory: every layer of a visit starts from its part.
        parts = tuple(part.contiguous() for part in split_tokens(self.input, sweep.stride))
        return self.runner.run(sweep, parts, outside, carried, self.contexts)

    def _outside(self) -> dict[int, KV]:
        """What layers of this segment read from below it."""
        first, last = self.segment.first, self.segment.last
        read = set(self.runner.sharing.sources[first : last + 1])
        return {layer: kv for layer, kv in self.shared.items() if layer in read}

    def _carried(self, sweep: Sweep) -> KVState:
        """Keys and values that are there before the first visit of ``sweep``."""
        match sweep.carry:
            case Carry.NOTHING:
                return {}
            case Carry.KV:
                kv = self.output.kv
                return {layer: blocks.with_stride(sweep.stride) for layer, blocks in kv.items()}
            case Carry.GROUP_INPUT:
                parts = split_tokens(self.input, sweep.stride)
                inputs = {layer: parts for layer in sweep.carried}
            case Carry.PROJECTED:
                inputs = {
                    layer: _detached(self.output.inputs[layer], sweep.stride)
                    for layer in sweep.carried
                }
        return {
            layer: self.runner.projected(layer, parts, self.contexts)
            for layer, parts in inputs.items()
        }


def _detached(parts: tuple[torch.Tensor, ...], stride: int) -> tuple[torch.Tensor, ...]:
    same = len(parts) == stride
    return tuple(
        part.detach() for part in (parts if same else split_tokens(join_tokens(parts), stride))
    )
