"""What the tasks of a cut plan cost, in FLOPs of a sequence (no torch)."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.work import (
    Work,
    carry_work,
    finish_work,
    head_work,
    segment_work,
    visit_work,
)
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.stages.order import TaskGraph
from megatron_kvshare.stages.placement import Placement
from megatron_kvshare.stages.tasks import (
    CarryTask,
    FinishTask,
    HeadTask,
    LayersTask,
    Task,
    VisitTask,
    tasks_of,
)


def task_graph(shape: ModelShape, plan: ExecutionPlan, placement: Placement) -> TaskGraph:
    """The tasks of one microbatch with their costs."""
    tasks = tasks_of(plan, placement)
    works = [tuple(_work(shape, plan.map, task)) for task in tasks]
    forward = tuple(sum(each.forward for each in work) for work in works)
    backward = tuple(sum(each.backward for each in work) for work in works)
    return TaskGraph(tasks, forward, backward, placement.ranks)


def _work(shape: ModelShape, sharing: SharingMap, task: Task) -> Iterable[Work]:
    match task:
        case LayersTask():
            return segment_work(shape, sharing, task.segment)
        case CarryTask():
            return carry_work(shape, task.sweep, task.inputs)
        case VisitTask():
            return visit_work(shape, sharing, task.sweep, task.visit)
        case FinishTask():
            return finish_work(shape, sharing, task.sweep)
        case HeadTask():
            return (head_work(shape),)
        case _:
            return ()
