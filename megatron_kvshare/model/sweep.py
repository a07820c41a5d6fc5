"""The sweeps of a cyclic group: its layers read keys and values that are made above them, so all
of them run several times, each time with what the time before has made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_kvshare.model.context import SequenceContexts, VisitContext
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import (
    KV,
    KVBlocks,
    KVState,
    join_tokens,
    relative_change,
    residual,
    split_tokens,
)
from megatron_kvshare.model.kv_view import KVView
from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.model.recompute import RecomputePolicy, recomputed
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import Carry, LayerStep, Segment, StepMode, Sweep, Visit

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Adds a tensor over all ranks that run this forward together."""

Inputs = Mapping[int, tuple[torch.Tensor, ...]]
"""Producer layer -> what entered it, ``[tokens, b, h]`` for each visit."""


class GroupOutput(NamedTuple):
    """Hidden states ``[s, b, h]`` above the group, all keys and values that are known then, and a
    residual ``[2]`` of every sweep where it was measured."""

    hidden: torch.Tensor
    kv: Mapping[int, KV]
    residuals: list[torch.Tensor]


class SweepOutput(NamedTuple):
    """``hidden`` ``[s, b, h]`` of all tokens after a last sweep, else unused; all KV that is known
    then; what entered the producers, where the sweep keeps it."""

    hidden: torch.Tensor
    kv: KVState
    inputs: Inputs


class VisitOutput(NamedTuple):
    """Hidden states after the last step that has any; all KV that is known then; what entered the
    producers that ran."""

    hidden: torch.Tensor
    kv: KVState
    inputs: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class SweepRunner:
    """Runs cyclic groups by any plan of ``sharing``; keeps nothing between two calls.

    A group runs its sweeps, a sweep visits token subsets one after another, a visit goes through
    the layers.
    """

    layers: Mapping[int, KVShareLayer]
    sharing: SharingMap
    heads: HeadLayout
    recompute: RecomputePolicy
    sum_over_ranks: SumOverRanks

    def run_group(
        self,
        segment: Segment,
        hidden: torch.Tensor,
        kv: Mapping[int, KV],
        contexts: SequenceContexts,
        measure: bool,
        keep_kv: bool = False,
    ) -> GroupOutput:
        """Every sweep that the plan asks for, each from the same ``hidden``; ``kv``: from below;
        ``keep_kv``: give out those of every producer, else what layers above the group read."""
        decide = any(sweep.skip_below is not None for sweep in segment.sweeps)
        output = SweepOutput(hidden, {}, {})
        rows, moved = [], math.inf
        for sweep in segment.sweeps:
            if sweep.skip_below is not None and moved <= sweep.skip_below:
                rows.append(torch.zeros(2, dtype=torch.float64, device=hidden.device))
                continue
            with torch.set_grad_enabled(sweep.gradient and torch.is_grad_enabled()):
                carried = self._carried(segment, sweep, hidden, output, contexts)
                known = {**self._outside(segment, kv, sweep.stride), **carried}
                output = self.run_sweep(sweep, hidden, known, contexts)
            if measure or (decide and not sweep.last):
                rows.append(residual(output.kv, carried, segment.targets))
                if decide and not sweep.last:
                    moved = relative_change(self.sum_over_ranks(rows[-1].clone()))
        leaving = {
            producer: output.kv[producer].whole()
            for producer in self._producers(segment)
            if keep_kv
            or any(reader > segment.last for reader in self.sharing.consumers_of(producer))
        }
        return GroupOutput(output.hidden, {**kv, **leaving}, rows if measure else [])

    def run_sweep(
        self, sweep: Sweep, hidden: torch.Tensor, known: KVState, contexts: SequenceContexts
    ) -> SweepOutput:
        """All visits and the finish of ``sweep``; ``known``: all KV there is to read at first."""
        tokens, every = hidden.shape[0], contexts.whole.num_tokens
        assert tokens == every or tokens % sweep.stride == 0, "a rank's tokens are no whole subsets"
        # Whole blocks of memory: every layer of a visit starts from its part.
        parts = [part.contiguous() for part in split_tokens(hidden, sweep.stride)]
        outputs: list[torch.Tensor] = []
        inputs: dict[int, tuple[torch.Tensor, ...]] = {}
        for visit in sweep.visits:
            context = contexts.visit(sweep.stride, visit.offset)
            output = self.run_visit(visit, parts[visit.offset], known, context)
            outputs.append(output.hidden)
            known = output.kv
            if sweep.keep_inputs:
                for layer, entered in output.inputs.items():
                    inputs[layer] = (*inputs.get(layer, ()), entered)
        if not sweep.last:
            return SweepOutput(outputs[-1], known, inputs)
        hidden = join_tokens(outputs)
        for step in sweep.finish:
            hidden = self.finish(step, hidden, known, contexts)
        return SweepOutput(hidden, known, inputs)

    def run_visit(
        self, visit: Visit, hidden: torch.Tensor, known: KVState, context: VisitContext
    ) -> VisitOutput:
        """Steps of one visit; ``known``: all KV there is to read when it begins."""
        inputs: dict[int, torch.Tensor] = {}
        for steps, again in self.recompute.chunks(visit.steps):
            run = recomputed(self.run_steps, again)
            hidden, known, entered = run(steps, hidden, known, context)
            inputs.update(entered)
        return VisitOutput(hidden, known, inputs)

    def run_steps(
        self,
        steps: Sequence[LayerStep],
        hidden: torch.Tensor,
        known: KVState,
        context: VisitContext,
    ) -> VisitOutput:
        """Layers from bottom to top, as much of each as its step asks for."""
        view = KVView(known, context)
        inputs: dict[int, torch.Tensor] = {}
        for step in steps:
            layer = self.layers[step.layer]
            if self.sharing.is_producer(step.layer):
                inputs[step.layer] = hidden
            if step.mode is StepMode.KV_ONLY:
                view = view.with_own(step.layer, layer.key_values(hidden, context))
            elif step.mode is StepMode.NO_ATTENTION and context.past is None:
                # A node of its own: backward then adds gradients in the order of a full layer.
                hidden = layer.feed_forward(hidden.view_as(hidden))
            elif (stand_in := self._stand_in(step, hidden, view)) is not None:
                source = self.sharing.sources[step.layer]
                hidden, _ = layer(hidden, view.reading(source, KVBlocks((stand_in,))))
            else:
                hidden, view = layer(hidden, view)
        return VisitOutput(hidden, view.known, inputs)

    def _stand_in(self, step: LayerStep, hidden: torch.Tensor, view: KVView) -> KV | None:
        """What an upward layer reads instead of keys and values that do not exist yet."""
        source = self.sharing.sources[step.layer]
        if step.mode is StepMode.OWN_INPUT:
            return self.layers[source].key_values(hidden, view.context)
        if source == step.layer or view.can_read(source):
            return None
        # The first sweep of a plan that does not skip the layer's attention.
        shape = (view.context.num_tokens, hidden.shape[1], self.heads.local_kv_heads)
        return KV(*hidden.new_zeros(2, *shape, self.heads.head_dim).unbind())

    def finish(
        self, step: LayerStep, hidden: torch.Tensor, known: KVState, contexts: SequenceContexts
    ) -> torch.Tensor:
        """A step for all tokens after the visits; it reads whole keys and values."""
        assert step.mode is StepMode.KV_GIVEN, step
        view = KVView.of_all_tokens({step.layer: known[step.layer].whole()}, contexts.whole)
        run = recomputed(self.layers[step.layer].read_own, self.recompute.includes(step))
        return run(hidden, view)

    def projected(
        self, layer: int, inputs: Sequence[torch.Tensor], contexts: SequenceContexts
    ) -> KVBlocks:
        """Keys and values that producer ``layer`` makes of ``inputs``, one for each visit."""
        visits = (contexts.visit(len(inputs), offset) for offset in range(len(inputs)))
        pairs = zip(inputs, visits, strict=True)
        return KVBlocks(tuple(self.layers[layer].key_values(x, visit) for x, visit in pairs))

    def _carried(
        self,
        segment: Segment,
        sweep: Sweep,
        hidden: torch.Tensor,
        before: SweepOutput,
        contexts: SequenceContexts,
    ) -> KVState:
        """Keys and values of the group that are there before the first visit of ``sweep``."""
        stride = sweep.stride
        inputs: Mapping[int, Sequence[torch.Tensor]]
        match sweep.carry:
            case Carry.NOTHING:
                return {}
            case Carry.KV:
                return {p: before.kv[p].with_stride(stride) for p in self._producers(segment)}
            case Carry.GROUP_INPUT:
                inputs = dict.fromkeys(sweep.carried, split_tokens(hidden, stride))
            case Carry.PROJECTED:
                inputs = {p: _detached(before.inputs[p], stride) for p in sweep.carried}
        return {p: self.projected(p, parts, contexts) for p, parts in inputs.items()}

    def _outside(self, segment: Segment, kv: Mapping[int, KV], stride: int) -> KVState:
        """What layers of the segment read from below it."""
        read = set(self.sharing.sources[segment.first : segment.last + 1])
        return {p: KVBlocks.of(whole, stride) for p, whole in kv.items() if p in read}

    def _producers(self, segment: Segment) -> Iterable[int]:
        return filter(self.sharing.is_producer, range(segment.first, segment.last + 1))


def _detached(parts: Sequence[torch.Tensor], stride: int) -> Sequence[torch.Tensor]:
    if len(parts) != stride:
        parts = split_tokens(join_tokens(parts), stride)
    return [part.detach() for part in parts]
