"""One sweep over the layers of a segment: visits, their keys and values, recomputation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.model.context import Readable, SequenceContexts, VisitContext
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV, KVBlocks, KVState
from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.model.tokens import join_tokens
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import LayerStep, StepMode, Sweep, Visit

Inputs = Mapping[int, tuple[torch.Tensor, ...]]
"""Producer layer -> what entered it, ``[tokens, b, h]`` for each visit."""


class SweepOutput(NamedTuple):
    """``hidden`` ``[s, b, h]`` of all tokens after a last sweep, else unused; the newest KV of all
    producers that ran; their inputs where the sweep keeps them."""

    hidden: torch.Tensor
    kv: KVState
    inputs: Inputs


class VisitOutput(NamedTuple):
    """Hidden states after the last step that has any; KV and inputs of the producers that ran."""

    hidden: torch.Tensor
    produced: Mapping[int, KV]
    inputs: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class SweepRunner:
    """Runs sweeps of any plan of ``sharing``; keeps nothing between two calls."""

    layers: Mapping[int, KVShareLayer]
    sharing: SharingMap
    heads: HeadLayout
    recompute: RecomputePolicy

    def run(
        self,
        sweep: Sweep,
        parts: Sequence[torch.Tensor],
        outside: KVState,
        carried: KVState,
        contexts: SequenceContexts,
    ) -> SweepOutput:
        """All visits and the finish of ``sweep``.

        ``parts``: the segment's input for each visit, ``[tokens, b, h]``; ``outside``: KV from
        below the segment; ``carried``: KV that is there before the sweep makes its own.
        """
        newest = dict(carried)
        outputs: list[torch.Tensor] = []
        inputs: dict[int, tuple[torch.Tensor, ...]] = {}
        for visit in sweep.visits:
            context = contexts.visit(sweep.stride, visit.offset)
            hidden = parts[visit.offset]
            output = self.run_visit(visit, hidden, {**outside, **newest}, context)
            outputs.append(output.hidden)
            for layer, own in output.produced.items():
                newest[layer] = _renewed(newest, layer, own, context)
                if sweep.keep_inputs:
                    inputs[layer] = (*inputs.get(layer, ()), output.inputs[layer])
        if not sweep.last:
            return SweepOutput(outputs[-1], newest, inputs)
        hidden = join_tokens(outputs)
        for step in sweep.finish:
            hidden = self.finish(step, hidden, newest, contexts)
        return SweepOutput(hidden, newest, inputs)

    def projected(
        self, layer: int, inputs: Sequence[torch.Tensor], contexts: SequenceContexts
    ) -> KVBlocks:
        """Keys and values that producer ``layer`` makes of ``inputs``, one for each visit."""
        visits = (contexts.visit(len(inputs), offset) for offset in range(len(inputs)))
        pairs = zip(inputs, visits, strict=True)
        return KVBlocks(tuple(self.layers[layer].key_values(x, visit) for x, visit in pairs))

    def run_visit(
        self, visit: Visit, hidden: torch.Tensor, kv: KVState, context: VisitContext
    ) -> VisitOutput:
        """Steps of one visit; ``kv``: all there is to read when it begins."""
        produced: dict[int, KV] = {}
        inputs: dict[int, torch.Tensor] = {}

        def run(steps: Sequence[LayerStep], hidden: torch.Tensor, kv: KVState) -> VisitOutput:
            return self._run_steps(steps, hidden, kv, context)

        for steps, recomputed in self.recompute.chunks(visit.steps):
            if recomputed and torch.is_grad_enabled():
                output = checkpoint(
                    run, steps, hidden, kv, use_reentrant=False, preserve_rng_state=False
                )
            else:
                output = run(steps, hidden, kv)
            hidden = output.hidden
            produced.update(output.produced)
            inputs.update(output.inputs)
            # A new mapping: what a recomputed chunk reads must not change after it has run.
            kv = kv | {
                layer: _renewed(kv, layer, own, context) for layer, own in output.produced.items()
            }
        return VisitOutput(hidden, produced, inputs)

    def _run_steps(
        self,
        steps: Sequence[LayerStep],
        hidden: torch.Tensor,
        kv: KVState,
        context: VisitContext,
    ) -> VisitOutput:
        reads = _Reads(kv, context, self.sharing)
        produced: dict[int, KV] = {}
        inputs: dict[int, torch.Tensor] = {}
        for step in steps:
            entered = hidden
            hidden, own = self._run_step(step, hidden, reads, context)
            if own is not None:
                produced[step.layer], inputs[step.layer] = own, entered
                reads.renew(step.layer, own)
        return VisitOutput(hidden, produced, inputs)

    def _run_step(
        self, step: LayerStep, hidden: torch.Tensor, reads: _Reads, context: VisitContext
    ) -> tuple[torch.Tensor, KV | None]:
        layer = self.layers[step.layer]
        if step.mode is StepMode.KV_ONLY:
            return hidden, layer.key_values(hidden, context)
        if step.mode is StepMode.NO_ATTENTION:
            # As a node of its own, so that backward adds gradients in the order of a full layer.
            return layer.feed_forward(hidden.view_as(hidden)), None
        return layer(hidden, context, self._source(step, hidden, reads, context))

    def _source(
        self, step: LayerStep, hidden: torch.Tensor, reads: _Reads, context: VisitContext
    ) -> Readable | KVBlocks:
        """What a layer reads: for a producer, what is known of its own KV so far."""
        source = self.sharing.sources[step.layer]
        if self.sharing.is_producer(step.layer):
            return reads.blocks(source)
        if step.mode is StepMode.OWN_INPUT:
            guess = self.layers[source].key_values(hidden, context)
            return context.readable(step.layer, KVBlocks((guess,)))
        if not reads.blocks(source).known:
            # An upward layer of the first sweep in a plan that does not skip its attention.
            return context.readable(step.layer, KVBlocks((self._zero_kv(hidden, context),)))
        return reads.readable(step.layer)

    def _zero_kv(self, hidden: torch.Tensor, context: VisitContext) -> KV:
        shape = (context.num_tokens, hidden.shape[1], self.heads.local_kv_heads)
        return KV(*hidden.new_zeros(2, *shape, self.heads.head_dim).unbind())

    def finish(
        self, step: LayerStep, hidden: torch.Tensor, kv: KVState, contexts: SequenceContexts
    ) -> torch.Tensor:
        """A step for all tokens after the visits; it reads whole keys and values."""
        assert step.mode is StepMode.KV_GIVEN, step
        layer, own = self.layers[step.layer], KVBlocks((kv[step.layer].whole(),))

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return layer.read_own(hidden, contexts.whole, own)

        recomputed = self.recompute.includes(step)
        if recomputed and torch.is_grad_enabled():
            return checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
        return run(hidden)


class _Reads:
    """What the layers of one visit read; arranges it for attention once, not for every layer."""

    def __init__(self, kv: KVState, context: VisitContext, sharing: SharingMap) -> None:
        self._kv = dict(kv)
        self._context = context
        self._sharing = sharing
        self._arranged: dict[tuple[int, bool, bool], Readable] = {}

    def blocks(self, producer: int) -> KVBlocks:
        return self._kv.get(producer, KVBlocks.unknown(self._context.stride))

    def readable(self, consumer: int) -> Readable:
        """For an upward layer the producer's KV is not new yet, for the others it is."""
        sharing = self._sharing
        producer = sharing.sources[consumer]
        key = (producer, sharing.is_upward(consumer), sharing.windowed[consumer])
        if key not in self._arranged:
            self._arranged[key] = self._context.readable(consumer, self.blocks(producer))
        return self._arranged[key]

    def renew(self, producer: int, own: KV) -> None:
        self._kv[producer] = _renewed(self._kv, producer, own, self._context)


def _renewed(kv: KVState, producer: int, own: KV, context: VisitContext) -> KVBlocks:
    """The producer's KV with what it has just made for the tokens of ``context``."""
    before = kv.get(producer, KVBlocks.unknown(context.stride))
    return before.with_block(context.offset, own)


class RecomputePolicy(NamedTuple):
    """Which layers of a stage are recomputed in backward (``--recompute-granularity full``), in
    which chunks: those below layer ``stop``."""

    layers_per_chunk: int
    stop: int

    @classmethod
    def of(cls, model: ModelConfig, layers: range) -> RecomputePolicy:
        """As in Megatron, ``--recompute-num-layers`` counts in each stage."""
        if model.recompute_granularity != "full":
            return cls(len(layers), layers.start)
        if model.recompute_method == "block":
            return cls(1, layers.start + (model.recompute_num_layers or len(layers)))
        return cls(model.recompute_num_layers or 1, layers.stop)

    def includes(self, step: LayerStep) -> bool:
        return step.layer < self.stop

    def chunks(self, steps: tuple[LayerStep, ...]) -> Iterator[tuple[tuple[LayerStep, ...], bool]]:
        """Consecutive steps that run as one unit, and whether that unit is recomputed."""
        inside = [step for step in steps if self.includes(step)]
        for start in range(0, len(inside), self.layers_per_chunk):
            yield tuple(inside[start : start + self.layers_per_chunk]), True
        if len(inside) < len(steps):
            yield steps[len(inside) :], False
