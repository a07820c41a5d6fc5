"""What a sharing map costs: FLOPs, KV cache (L1, no torch).

FLOPs are counted from the steps of an :class:`ExecutionPlan`, so they are what the sweeps need
after skipping. Conventions: one multiply-add = 2 FLOPs; matrix products only (no norms, rotations,
activations); attention counts exactly the tokens its mask shows; the embedding look-up is free and
the output head is counted; backward = 2 x forward. The keys and values that upward layers read in
the first gradient sweep are constants, so two products of that attention backward are not strictly
needed; they are counted all the same, because fused attention kernels compute them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

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
from megatron_kvshare.sharing.shape import ModelShape
from megatron_kvshare.sharing.solver import jacobi_plan
from megatron_kvshare.sharing.weights import parameters

KV_BYTES_PER_ELEMENT = 2  # a cache is kept in 16 bit
_FLOPS_PER_MAC = 2
TRAIN_OVER_FORWARD = 3  # forward + backward
# AdamW per element: two moments 7, bias corrections 2, update 4, decay 2; gradient clipping 3.
_OPTIMIZER_FLOPS_PER_PARAMETER = 18


@dataclass(frozen=True)
class Costs:
    """Costs of a map, and of the standard map of the same shape where a ratio says so.

    ``train_factor`` and ``prefill_factor`` count whole layer-forwards over a standard stack (no
    skipping, backward = two forwards), as the published formulas do; ``train_work`` and
    ``prefill_work`` leave out the layers of which a sweep only needs keys and values.
    ``sequential_depth``: layers that run one after another in a prefill, over a standard stack.
    Where the number of sweeps is found while running, all costs are those of the most sweeps.
    """

    parameters: int
    kv_bytes_per_token: int
    kv_reduction: float
    train_factor: float
    prefill_factor: float
    train_work: float
    prefill_work: float
    sequential_depth: float
    train_flops_per_token: float
    train_flops_ratio: float
    prefill_flops: float
    prefill_flops_ratio: float


def costs(shape: ModelShape, plan: ExecutionPlan) -> Costs:
    """All costs of one plan."""
    standard = standard_plan(shape.num_layers)
    train, prefill = train_flops_per_token(shape, plan), prefill_flops(shape, plan)
    return Costs(
        parameters=parameters(shape, plan.map),
        kv_bytes_per_token=kv_bytes_per_token(shape, plan.map),
        kv_reduction=plan.map.num_layers / len(plan.map.producers),
        train_factor=train_factor(plan),
        prefill_factor=prefill_factor(plan),
        train_work=train_work(plan),
        prefill_work=prefill_work(plan),
        sequential_depth=sequential_depth(plan),
        train_flops_per_token=train,
        train_flops_ratio=train / train_flops_per_token(shape, standard),
        prefill_flops=prefill,
        prefill_flops_ratio=prefill / prefill_flops(shape, standard),
    )


def standard_plan(num_layers: int) -> ExecutionPlan:
    """The baseline: every layer owns its keys and values, full attention, one sweep."""
    return jacobi_plan(SharingMap(tuple(range(num_layers)), (False,) * num_layers))


# ---- memory of the cache ----


def kv_bytes_per_token(
    shape: ModelShape, map: SharingMap, bytes_per_element: int = KV_BYTES_PER_ELEMENT
) -> int:
    """KV cache per token: keys and values of the producers only."""
    return len(map.producers) * 2 * shape.kv_width * bytes_per_element


def kv_cache_bytes(
    shape: ModelShape, map: SharingMap, tokens: int, bytes_per_element: int = KV_BYTES_PER_ELEMENT
) -> int:
    """KV cache of one sequence. A producer read through windows only keeps the last window."""
    window = shape.window_size or tokens
    full = {source for source, marked in zip(map.sources, map.windowed, strict=True) if not marked}
    kept = sum(tokens if layer in full else min(tokens, window) for layer in map.producers)
    return kept * 2 * shape.kv_width * bytes_per_element


# ---- work ----


def train_factor(plan: ExecutionPlan) -> float:
    """Layer-forwards of a training step over those of a standard stack (arXiv 2410.14442, 3.3)."""
    return _layer_forwards(plan, gradient_weight=3) / (3 * plan.map.num_layers)


def prefill_factor(plan: ExecutionPlan) -> float:
    """Layer-forwards of a prefill with the plan's sweeps over those of a standard stack."""
    return _layer_forwards(plan, gradient_weight=1) / plan.map.num_layers


def _layer_forwards(plan: ExecutionPlan, gradient_weight: int) -> int:
    return sum(
        segment.num_layers * (gradient_weight if sweep.gradient else 1)
        for segment, sweep in _sweeps(plan)
    )


def train_work(plan: ExecutionPlan) -> float:
    """As :func:`train_factor`, without the layers of which only keys and values are wanted."""
    return _layer_work(plan, gradient_weight=3) / (3 * plan.map.num_layers)


def prefill_work(plan: ExecutionPlan) -> float:
    """As :func:`prefill_factor`, without the layers of which only keys and values are wanted."""
    return _layer_work(plan, gradient_weight=1) / plan.map.num_layers


def _layer_work(plan: ExecutionPlan, gradient_weight: int) -> float:
    return sum(
        share * (gradient_weight if sweep.gradient else 1)
        for _, sweep in _sweeps(plan)
        for step, share in sweep.weighted_steps
        if step.mode is not StepMode.KV_ONLY
    )


def sequential_depth(plan: ExecutionPlan) -> float:
    """Layers one after another over those of a standard stack: every visit waits for the last."""
    steps = sum(
        step.mode is not StepMode.KV_ONLY
        for _, sweep in _sweeps(plan)
        for step, _ in sweep.weighted_steps
    )
    return steps / plan.map.num_layers


def _sweeps(plan: ExecutionPlan) -> Iterator[tuple[Segment, Sweep]]:
    return ((segment, sweep) for segment in plan.segments for sweep in segment.sweeps)


def train_flops_per_token(shape: ModelShape, plan: ExecutionPlan) -> float:
    """Forward and backward of all layers and the head, per token of a batch, optimizer left out."""
    layers = _layer_flops(shape, plan, gradient_weight=TRAIN_OVER_FORWARD)
    return layers + TRAIN_OVER_FORWARD * head_flops(shape)


def train_step_flops(shape: ModelShape, plan: ExecutionPlan, tokens: int) -> float:
    """One whole optimizer step over a global batch of ``tokens``, AdamW and clipping included."""
    optimizer = _OPTIMIZER_FLOPS_PER_PARAMETER * parameters(shape, plan.map)
    return tokens * train_flops_per_token(shape, plan) + optimizer


def prefill_flops(shape: ModelShape, plan: ExecutionPlan) -> float:
    """A prompt of ``seq_length`` tokens through the plan's sweeps; the head for its last token."""
    layers = _layer_flops(shape, plan, gradient_weight=1)
    return shape.seq_length * layers + head_flops(shape)


def _layer_flops(shape: ModelShape, plan: ExecutionPlan, gradient_weight: int) -> float:
    return sum(segment_flops(shape, plan.map, each, gradient_weight) for each in plan.segments)


def segment_flops(
    shape: ModelShape, map: SharingMap, segment: Segment, gradient_weight: int
) -> float:
    """All sweeps of a segment, per token; those with gradient count ``gradient_weight`` times."""
    return sum(
        sweep_flops(shape, map, sweep) * (gradient_weight if sweep.gradient else 1)
        + _carry_flops(shape, sweep, gradient_weight)
        for sweep in segment.sweeps
    )


def sweep_flops(shape: ModelShape, map: SharingMap, sweep: Sweep) -> float:
    """Forward FLOPs of one sweep per token, without what it carries in.

    Token subsets count as equally large.
    """
    visits = sum(
        step_flops(shape, map, step, _mean_visible_in_visit(shape, map, step.layer, sweep, visit))
        for visit in sweep.visits
        for step in visit.steps
    )
    return visits / sweep.stride + sum(step_flops(shape, map, step) for step in sweep.finish)


def _carry_flops(shape: ModelShape, sweep: Sweep, gradient_weight: int) -> float:
    """Keys and values of the carried producers, made before the first visit."""
    if sweep.carry not in (Carry.GROUP_INPUT, Carry.PROJECTED):
        return 0
    weight = gradient_weight if sweep.gradient else 1
    if sweep.carry is Carry.PROJECTED:  # its input is a constant: backward is one product
        weight = min(weight, 2)
    return weight * len(sweep.carried) * kv_projection_flops(shape)


def kv_projection_flops(shape: ModelShape) -> float:
    """Keys and values of one producer, forward per token."""
    return _FLOPS_PER_MAC * 2 * shape.hidden_size * shape.kv_width


def step_flops(
    shape: ModelShape, map: SharingMap, step: LayerStep, visible: float | None = None
) -> float:
    """Forward FLOPs of one step, per token (mean over a sequence of ``seq_length``).

    ``visible``: keys a query sees on average; left out: those of all tokens.
    """
    if step.mode is StepMode.KV_ONLY:
        return kv_projection_flops(shape)
    flops: float = _FLOPS_PER_MAC * 3 * shape.hidden_size * shape.ffn_hidden_size
    if step.mode is StepMode.NO_ATTENTION:
        return flops
    keys = mean_visible_tokens(shape, map, step.layer) if visible is None else visible
    flops += _FLOPS_PER_MAC * 2 * shape.query_width * (shape.hidden_size + keys)
    projects = step.mode is StepMode.OWN_INPUT or (
        step.mode is StepMode.FULL and map.is_producer(step.layer)
    )
    return flops + (kv_projection_flops(shape) if projects else 0)


def _mean_visible_in_visit(
    shape: ModelShape, map: SharingMap, layer: int, sweep: Sweep, visit: Visit
) -> float:
    """Mean over the queries of a visit; before the first sweep is through, some keys are not there.

    Where all are there, the mean over all tokens stands for each visit: the sum is the same.
    """
    own = sweep.visits[0].steps  # layers below the group are there from the start
    outside = not any(step.layer == map.sources[layer] for step in own)
    if sweep.carry is not Carry.NOTHING or sweep.stride == 1 or outside:
        return mean_visible_tokens(shape, map, layer)
    known = visit.offset + (0 if map.is_upward(layer) else 1)
    window = shape.window_size if map.windowed[layer] else None
    pairs = _visible_pairs(
        shape.seq_length, window, map.is_upward(layer), sweep.stride, visit.offset, known
    )
    return pairs / max(1, subset_length(shape.seq_length, sweep.stride, visit.offset))


@cache
def _visible_pairs(
    length: int, window: int | None, strict: bool, stride: int, offset: int, known: int
) -> int:
    """Pairs of a query ``t % stride == offset`` and a key it sees with ``u % stride < known``."""
    pairs = 0
    for query in range(offset, length, stride):
        newest = query - 1 if strict else query
        oldest = 0 if window is None else max(0, query - window + 1)
        pairs += sum(
            (newest - residue) // stride - (oldest - 1 - residue) // stride
            for residue in range(known)
        )
    return pairs


def mean_visible_tokens(shape: ModelShape, map: SharingMap, layer: int) -> float:
    """How many keys a query of ``layer`` sees, mean over a sequence: causal, strict if upward."""
    hidden_diagonal = int(map.is_upward(layer))
    most = shape.seq_length
    if map.windowed[layer] and shape.window_size is not None:
        most = min(most, shape.window_size)
    # The query at position t (from 1) sees min(t, most) keys, less its own in an upward layer.
    longest, cap = shape.seq_length - hidden_diagonal, most - hidden_diagonal
    visible = cap * (cap + 1) // 2 + (longest - cap) * cap
    return visible / shape.seq_length


def head_flops(shape: ModelShape) -> int:
    """The output head, forward per token."""
    return _FLOPS_PER_MAC * shape.vocab_size * shape.hidden_size
