"""What the tasks of a cut plan cost, in FLOPs per token (L1, no torch)."""

from __future__ import annotations

from megatron_kvshare.sharing.cost import (
    TRAIN_OVER_FORWARD,
    head_flops,
    kv_projection_flops,
    segment_flops,
    step_flops,
)
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.order import TaskGraph
from megatron_kvshare.sharing.placement import Placement
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.shape import ModelShape
from megatron_kvshare.sharing.tasks import Kind, Task, tasks_of


def task_graph(shape: ModelShape, plan: ExecutionPlan, placement: Placement) -> TaskGraph:
    """The tasks of one microbatch with their costs."""
    tasks = tasks_of(plan, placement)
    costs = [_costs(shape, plan.map, task) for task in tasks]
    forward, backward = zip(*costs, strict=True)
    return TaskGraph(tasks, forward, backward, placement.ranks)


def _costs(shape: ModelShape, sharing: SharingMap, task: Task) -> tuple[float, float]:
    """Forward and backward."""
    if task.kind is Kind.LAYERS:
        assert task.segment is not None
        forward = segment_flops(shape, sharing, task.segment, gradient_weight=1)
        both = segment_flops(shape, sharing, task.segment, gradient_weight=TRAIN_OVER_FORWARD)
        return forward, both - forward
    forward = _forward(shape, sharing, task)
    return forward, (TRAIN_OVER_FORWARD - 1) * forward if task.gradient else 0.0


def _forward(shape: ModelShape, sharing: SharingMap, task: Task) -> float:
    match task.kind:
        case Kind.HEAD:
            return head_flops(shape)
        case Kind.CARRY:
            return kv_projection_flops(shape) * len(task.kv)
        case Kind.VISIT:
            assert task.visit is not None
            steps = sum(step_flops(shape, sharing, step) for step in task.visit.steps)
            return steps / task.the_sweep.stride
        case Kind.FINISH:
            return sum(step_flops(shape, sharing, step) for step in task.the_sweep.finish)
        case _:
            return 0.0
