"""How much memory one rank needs where DeepSpeed trains, and what its ZeRO-3 gathers for layers
that run several times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_kvshare.costs.memory import (
    TrainingLayout,
    TrainingMemory,
    activation_bytes,
    logit_bytes,
)
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import parameters, weights
from megatron_kvshare.sharing.plan import ExecutionPlan, Segment

_FP32_BYTES = 4
_MASTER_AND_MOMENTS = 12
_ALL_REDUCE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed copies together to reduce them, where ZeRO does not."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What of DeepSpeed's configuration costs memory; sizes in elements."""

    stage: int
    accumulates_in_fp32: bool = True
    reduce_bucket: int = 500_000_000
    overlaps_reduction: bool = False
    max_live: int = 1_000_000_000
    prefetch_bucket: int = 50_000_000
    offloads_optimizer: bool = False
    offloads_weights: bool = False


@dataclass(frozen=True)
class ZeroMemory(TrainingMemory):
    """Bytes on one rank; ``buffers``: weights that are gathered, gradients that are reduced."""

    buffers: int


def zero_memory(
    shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout, zero: Zero
) -> ZeroMemory:
    """Estimate for one rank: as megatron-core's, but for the state of the training.

    DeepSpeed keeps an fp32 copy of the weights whose optimizer state it shares out, of fp32 weights
    too. Weights that ZeRO-3 has gathered count as far as ``max_live`` lets them live.
    """
    owned, part = _on_rank(shape, plan, layout)
    gradients = _gradient_bytes(owned, part, layout, zero)
    gathered = 0
    if zero.stage == 3:
        gathered = min(owned, zero.max_live + zero.prefetch_bucket) * layout.bytes_per_element
    if zero.offloads_optimizer and zero.stage >= 2:
        gradients = 0
    return ZeroMemory(
        weights=0 if _weights_are_away(zero) else _weight_bytes(owned, part, layout, zero),
        gradients=gradients,
        optimizer=0 if _optimizer_is_away(zero) else _optimizer_bytes(owned, part, layout, zero),
        activations=activation_bytes(shape, plan, layout),
        logits=logit_bytes(shape, layout),
        buffers=gathered + _reduction_bytes(owned, layout, zero),
    )


def host_bytes(shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout, zero: Zero) -> int:
    """What of a rank lies in the memory of the host: gradients are added up where the optimizer
    is."""
    owned, part = _on_rank(shape, plan, layout)
    size = 0
    if _optimizer_is_away(zero):
        size += _optimizer_bytes(owned, part, layout, zero) + part * _FP32_BYTES
    if _weights_are_away(zero):
        size += _weight_bytes(owned, part, layout, zero)
    return size


def _optimizer_is_away(zero: Zero) -> bool:
    return zero.offloads_optimizer and zero.stage > 0


def _weights_are_away(zero: Zero) -> bool:
    return zero.offloads_weights and zero.stage == 3


def _on_rank(shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout) -> tuple[int, int]:
    """Elements that a rank trains, and its part where they are shared out."""
    owned = -(-parameters(shape, plan.map) // layout.tensor_model_parallel_size)
    return owned, -(-owned // layout.data_parallel_size)


def _weight_bytes(owned: int, part: int, layout: TrainingLayout, zero: Zero) -> int:
    return (part if zero.stage == 3 else owned) * layout.bytes_per_element


def _optimizer_bytes(owned: int, part: int, layout: TrainingLayout, zero: Zero) -> int:
    if zero.stage == 0:
        return owned * (_MASTER_AND_MOMENTS if layout.bf16 else 2 * _FP32_BYTES)
    return part * _MASTER_AND_MOMENTS


def _gradient_bytes(owned: int, part: int, layout: TrainingLayout, zero: Zero) -> int:
    made, summed = layout.bytes_per_element, _FP32_BYTES if zero.accumulates_in_fp32 else 2
    if zero.stage >= 2:
        return part * summed
    if zero.stage == 0 or summed == made:
        return owned * made
    return owned * (made + summed)


def _reduction_bytes(owned: int, layout: TrainingLayout, zero: Zero) -> int:
    whole = layout.bf16 and zero.accumulates_in_fp32 and not zero.offloads_optimizer
    if zero.stage == 0 or (zero.stage == 1 and whole):
        return min(owned, _ALL_REDUCE_ELEMENTS) * _FP32_BYTES
    buffers = 2 if zero.overlaps_reduction and zero.stage < 3 else 1
    return buffers * min(owned, zero.reduce_bucket) * _FP32_BYTES


@dataclass(frozen=True)
class Gathers:
    """What ZeRO-3 does for the layers of a cyclic group, ``first`` to ``last``, in a microbatch.

    ``forward`` and ``backward``: how often each layer is gathered if none stays; ``elements``: of
    all layers of the group on one rank, which must stay for a layer to be gathered once.
    """

    first: int
    last: int
    forward: int
    backward: int
    elements: int


def gathers(shape: ModelShape, plan: ExecutionPlan, tensor_ranks: int) -> tuple[Gathers, ...]:
    """Of every cyclic group, for the layer that runs most often."""
    sizes: Counter[int] = Counter()
    for each in weights(shape, plan.map):
        if each.layer is not None:
            sizes[each.layer] += each.size
    return tuple(
        Gathers(
            first=group.first,
            last=group.last,
            forward=_runs(group, gradient_only=False),
            backward=_runs(group, gradient_only=True),
            elements=sum(
                -(-sizes[layer] // tensor_ranks) for layer in range(group.first, group.last + 1)
            ),
        )
        for group in plan.groups
    )


def _runs(group: Segment, gradient_only: bool) -> int:
    counts = Counter(
        step.layer
        for sweep in group.sweeps
        if sweep.gradient or not gradient_only
        for step, _ in sweep.weighted_steps
    )
    return max(counts.values(), default=0)
