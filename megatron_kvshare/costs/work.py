"""The FLOPs of an execution plan, piece by piece: whatever else counts FLOPs is a sum of these.

They are counted from the steps of an :class:`ExecutionPlan`, so they are what the sweeps need after
skipping, for one sequence of ``seq_length`` tokens, and whole numbers: sums over layers, stages or
tasks are those of the plan exactly. Conventions: one multiply-add = 2 FLOPs; matrix products only
(no norms, rotations, activations); attention counts exactly the tokens its mask shows; the
embedding look-up is free and the output head is counted; backward = 2 x forward. The keys and
values that upward layers read in the first gradient sweep are constants, so two products of that
attention backward are not strictly needed; they are counted all the same, because fused attention
kernels compute them anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import (
    Carry,
    ExecutionPlan,
    LayerStep,
    Segment,
    StepMode,
    Sweep,
    Visit,
    subset_length,
)

_FLOPS_PER_MAC = 2
_BACKWARD = 2
"""Over forward: every product has two factors, and a product for the gradient of each."""


@dataclass(frozen=True)
class Work:
    """FLOPs of a piece of ``layer``; ``backward`` is 0 in a sweep without gradient."""

    layer: int
    forward: int
    backward: int

    @property
    def training(self) -> int:
        return self.forward + self.backward


# ---- pieces ----


def carry_work(shape: ModelShape, sweep: Sweep, producers: Iterable[int]) -> Iterator[Work]:
    """Keys and values that a sweep begins with: projections, of some of the carried producers."""
    if sweep.carry not in (Carry.GROUP_INPUT, Carry.PROJECTED):
        return
    forward = shape.seq_length * _kv_projection(shape)
    # What entered the producers in the sweep before is a constant, but the norm's weight is not:
    # backward goes through the projection to there.
    for producer in producers:
        yield _work(producer, forward, sweep)


def visit_work(shape: ModelShape, map: SharingMap, sweep: Sweep, visit: Visit) -> Iterator[Work]:
    """The steps of a visit of ``sweep``, or of the part of one that a stage has."""
    tokens = subset_length(shape.seq_length, sweep.stride, visit.offset)
    for step in visit.steps:
        pairs = _pairs_in_visit(shape, map, step.layer, sweep, visit.offset)
        yield _work(step.layer, step_flops(shape, map, step, tokens, pairs), sweep)


def finish_work(shape: ModelShape, map: SharingMap, sweep: Sweep) -> Iterator[Work]:
    """The steps for all tokens after the visits."""
    for step in sweep.finish:
        pairs = visible_pairs(shape, map, step.layer)
        yield _work(step.layer, step_flops(shape, map, step, shape.seq_length, pairs), sweep)


def head_work(shape: ModelShape) -> Work:
    """The output head, with the last layer."""
    forward = shape.seq_length * head_flops(shape)
    return Work(shape.num_layers - 1, forward, _BACKWARD * forward)


def _work(layer: int, forward: int, sweep: Sweep) -> Work:
    return Work(layer, forward, _BACKWARD * forward if sweep.gradient else 0)


# ---- sums ----


def sweep_work(shape: ModelShape, map: SharingMap, sweep: Sweep) -> Iterator[Work]:
    """Everything a sweep computes, what it carries in included."""
    yield from carry_work(shape, sweep, sweep.carried)
    for visit in sweep.visits:
        yield from visit_work(shape, map, sweep, visit)
    yield from finish_work(shape, map, sweep)


def segment_work(shape: ModelShape, map: SharingMap, segment: Segment) -> Iterator[Work]:
    """All sweeps of a segment."""
    for sweep in segment.sweeps:
        yield from sweep_work(shape, map, sweep)


def plan_work(shape: ModelShape, plan: ExecutionPlan) -> Iterator[Work]:
    """All layers; the head is not among them."""
    for segment in plan.segments:
        yield from segment_work(shape, plan.map, segment)


def training_flops_by_layer(shape: ModelShape, plan: ExecutionPlan) -> list[int]:
    """Forward and backward of every layer in all its sweeps, the head with the last."""
    flops = [0] * plan.map.num_layers
    for each in (*plan_work(shape, plan), head_work(shape)):
        flops[each.layer] += each.training
    return flops


# ---- what a step costs ----


def step_flops(shape: ModelShape, map: SharingMap, step: LayerStep, tokens: int, pairs: int) -> int:
    """Forward FLOPs of one step for ``tokens`` queries, that see ``pairs`` keys between them."""
    if step.mode is StepMode.KV_ONLY:
        return tokens * _kv_projection(shape)
    mlp = _FLOPS_PER_MAC * 3 * shape.hidden_size * shape.ffn_hidden_size
    if step.mode is StepMode.NO_ATTENTION:
        return tokens * mlp
    queries_and_output = _FLOPS_PER_MAC * 2 * shape.hidden_size * shape.query_width
    scores_and_values = _FLOPS_PER_MAC * 2 * shape.query_width
    projects = step.mode is StepMode.OWN_INPUT or (
        step.mode is StepMode.FULL and map.is_producer(step.layer)
    )
    linear = mlp + queries_and_output + (_kv_projection(shape) if projects else 0)
    return tokens * linear + pairs * scores_and_values


def _kv_projection(shape: ModelShape) -> int:
    """Keys and values of one producer, forward per token."""
    return _FLOPS_PER_MAC * 2 * shape.hidden_size * shape.kv_width


def head_flops(shape: ModelShape) -> int:
    """The output head, forward per token."""
    return _FLOPS_PER_MAC * shape.vocab_size * shape.hidden_size


def visible_pairs(shape: ModelShape, map: SharingMap, layer: int) -> int:
    """Queries and the keys they see, of all tokens: causal, strict in an upward layer."""
    return _pairs(shape.seq_length, _window(shape, map, layer), map.is_upward(layer), 1, 0, 1)


def _pairs_in_visit(
    shape: ModelShape, map: SharingMap, layer: int, sweep: Sweep, offset: int
) -> int:
    """The same for the queries of a visit; before the first sweep is through, some keys are not
    there."""
    group = {step.layer for step in sweep.visits[0].steps}  # layers below are there from the start
    known = sweep.stride
    if sweep.carry is Carry.NOTHING and sweep.stride > 1 and map.sources[layer] in group:
        known = offset + (0 if map.is_upward(layer) else 1)
    window, strict = _window(shape, map, layer), map.is_upward(layer)
    return _pairs(shape.seq_length, window, strict, sweep.stride, offset, known)


def _window(shape: ModelShape, map: SharingMap, layer: int) -> int | None:
    return shape.window_size if map.windowed[layer] else None


@cache
def _pairs(
    length: int, window: int | None, strict: bool, stride: int, offset: int, known: int
) -> int:
    """Pairs of a query ``t % stride == offset`` and a key it sees with ``u % stride < known``."""
    pairs = 0
    for query in range(offset, length, stride):
        newest = query - 1 if strict else query
        oldest = 0 if window is None else max(0, query - window + 1)
        if known == stride:
            pairs += newest - oldest + 1
            continue
        pairs += sum(
            (newest - residue) // stride - (oldest - 1 - residue) // stride
            for residue in range(known)
        )
    return pairs
