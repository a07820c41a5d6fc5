"""What a sharing map costs beside a standard one: FLOPs, layer runs, KV cache (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import parameters
from megatron_kvshare.costs.work import head_flops, plan_work, training_flops_by_layer
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan, Segment, StepMode, Sweep
from megatron_kvshare.sharing.solver import jacobi_plan

KV_BYTES_PER_ELEMENT = 2  # a cache is kept in 16 bit


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
    prefill_flops: int
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


def kv_bytes_per_token(
    shape: ModelShape, map: SharingMap, bytes_per_element: int = KV_BYTES_PER_ELEMENT
) -> int:
    """KV cache per token: keys and values of the producers only."""
    return len(map.producers) * 2 * shape.kv_width * bytes_per_element


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
    return sum(training_flops_by_layer(shape, plan)) / shape.seq_length


def prefill_flops(shape: ModelShape, plan: ExecutionPlan) -> int:
    """A prompt of ``seq_length`` tokens through the plan's sweeps; the head for its last token."""
    return sum(each.forward for each in plan_work(shape, plan)) + head_flops(shape)
