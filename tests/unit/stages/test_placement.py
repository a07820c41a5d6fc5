"""Stages: what crosses the cuts, and the tasks of a cut plan against the plan itself."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lower_bound import lower_bound
from megatron_kvshare.costs.memory import TrainingMemory
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import parameters, stage_parameters
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES, Recipe, Start, solver_plan
from megatron_kvshare.stages.messages import MessagePlan
from megatron_kvshare.stages.order import Action, best_schedule, makespan
from megatron_kvshare.stages.placement import (
    PayloadShape,
    Placement,
    boundary_widths,
)
from megatron_kvshare.stages.rank_memory import on_fullest_rank
from megatron_kvshare.stages.task_cost import task_graph
from megatron_kvshare.stages.tasks import FinishTask, VisitTask, tasks_of
from tests.unit.sharing.strategies import recipes, sharing_maps

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=101,
    seq_length=16,
)


def payload(**settings) -> PayloadShape:
    return PayloadShape.of(SHAPE, 2, 4, **settings)


def test_kv_goes_only_as_far_as_its_last_consumer() -> None:
    stages = Placement(SharingMap.parse("0_0_2_2_0_5_6_6"), (2, 2, 2, 2), 4).stages
    assert [stage.sends for stage in stages] == [(0,), (0,), (), ()]
    assert [stage.receives for stage in stages] == [(), (0,), (0,), ()]
    assert [stage.forwards for stage in stages] == [(), (0,), (), ()]


def test_virtual_stages_lie_on_ranks_in_turn() -> None:
    placed = Placement(build_map(8, "pizza-bottom", 3), (2, 2, 2, 2), 2)
    assert [(s.rank, s.chunk) for s in placed.stages] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [s.number for s in placed.stages_of(1)] == [1, 3]


def test_groups_inside_and_over_stages() -> None:
    sharing = SharingMap.parse("0_2_2_3_6_6_6_7")
    assert Placement(sharing, (4, 4), 2).spanning_groups == ()
    placed = Placement(sharing, (2, 2, 2, 2), 4)
    assert placed.spanning_groups == ((1, 2), (4, 6))
    assert list(placed.upward_reads_across_stages()) == [(1, 2), (4, 6), (5, 6)]


def test_widths_and_bytes() -> None:
    """Per row: hidden 64 and, for each producer, keys and values of 4 heads of width 8."""
    sharing = SharingMap.parse("0_0_2_2_0_5_6_6")
    assert boundary_widths(Placement(sharing, (2, 2, 2, 2), 4), payload()) == (128, 128, 64)
    assert boundary_widths(Placement(sharing, (2, 2, 2, 2), 2), payload()) == (128, 128, 128)
    # Two ranks, each with its heads; under SP rows are halved and KV lie side by side.
    placed = Placement(sharing, (2, 2, 2, 2), 4)
    assert boundary_widths(placed, payload(tensor_ranks=2)) == (96, 96, 64)
    split = payload(tensor_ranks=2, sequence_parallel=True)
    assert boundary_widths(placed, split) == (128, 128, 64)
    assert split.bytes(128) == 8 * 2 * 128 * 4


LAYOUTS = st.sampled_from([(2, (4, 4)), (4, (2, 2, 2, 2)), (2, (2, 2, 2, 2)), (4, (1, 3, 3, 1))])
MAPS = sharing_maps(min_layers=8, max_layers=8)


@given(MAPS, recipes(), LAYOUTS)
def test_tasks_run_every_step_of_the_plan_once(sharing, recipe: Recipe, layout) -> None:
    if recipe.start is Start.SELF:
        return
    placed = Placement(sharing, layout[1], layout[0])
    plan = solver_plan(sharing, recipe)
    tasks = tasks_of(plan, placed)
    ran = Counter()
    for task in tasks:
        if isinstance(task, VisitTask):
            steps, offset = task.visit.steps, task.visit.offset
        elif isinstance(task, FinishTask):
            steps, offset = (task.step,), None
        else:
            continue
        ran.update((task.number, offset, step) for step in steps)
        assert all(step.layer in task.stage.layers for step in steps)
    spanning = set(placed.spanning_groups)
    wanted = Counter(
        (number, offset, step)
        for segment in plan.groups
        if (segment.first, segment.last) in spanning
        for number, sweep in enumerate(segment.sweeps)
        for offset, steps in (
            *((visit.offset, visit.steps) for visit in sweep.visits),
            (None, sweep.finish),
        )
        for step in steps
    )
    assert ran == wanted


@given(MAPS, recipes(), LAYOUTS, st.integers(1, 5), st.booleans())
def test_schedules_respect_what_tasks_read(
    sharing, recipe: Recipe, layout, microbatches: int, forward_only: bool
) -> None:
    """Every value is made before it is read, every gradient before it is used, messages match."""
    if recipe.start is Start.SELF:
        return
    placed = Placement(sharing, layout[1], layout[0])
    graph = task_graph(SHAPE, solver_plan(sharing, recipe), placed)
    schedule = best_schedule(graph, microbatches, forward_only)
    end = {each.action: each.end for rank in schedule for each in rank}
    assert set(end) == set(graph.actions(microbatches, forward_only))
    for rank in schedule:
        clock = 0.0
        for each in rank:
            assert each.start >= clock - 1e-6
            clock = each.end
            assert all(end[earlier] <= each.start + 1e-6 for earlier in graph.before(each.action))
    if not forward_only:
        assert makespan(schedule) >= lower_bound(graph, microbatches) * (1 - 1e-9)

    order = [[each.action for each in rank] for rank in schedule]
    messages = MessagePlan(graph, order, forward_only)
    for rank, actions in enumerate(order):
        others = [other for other in range(placed.ranks) if other != rank]
        sent = [m for other in others for m in messages.between(other, rank)]
        needed = {m for action in actions for m in messages.needed_by(action)}
        assert len(sent) == len(set(sent)) and set(sent) == needed


def test_a_value_is_sent_once_to_each_rank_that_reads_it() -> None:
    """sandwich-top over two ranks: the group's input is read by every sweep, sent never."""
    sharing = build_map(8, "sandwich-top", 3)
    placed = Placement(sharing, (4, 4), 2)
    graph = task_graph(SHAPE, solver_plan(sharing, Recipe(forward_sweeps=1)), placed)
    edges = MessagePlan(graph, (), forward_only=False).edges
    keys = [key for ranks in edges.values() for edge in ranks.values() for key in edge.keys]
    assert len(keys) == len(set(keys))
    backs = [edge for ranks in edges.values() for edge in ranks.values() if edge.gradients]
    no_gradient = [graph.tasks[maker].gradient for maker, ranks in edges.items() if ranks]
    assert 0 < len(backs) < len(no_gradient) and not all(no_gradient)


@pytest.mark.parametrize("recipe", RECIPES)
def test_schedule_is_near_the_bound(recipe: str) -> None:
    """Two ranks, four microbatches for each."""
    sharing = build_map(8, "sandwich-top", 3)
    plan = solver_plan(sharing, RECIPES[recipe])
    graph = task_graph(SHAPE, plan, Placement(sharing, (4, 4), 2))
    assert makespan(best_schedule(graph, 8)) <= 1.15 * lower_bound(graph, 8)


@pytest.mark.parametrize("microbatches", [1, 4, 8])
def test_order_begins_with_the_oldest_microbatch(microbatches: int) -> None:
    sharing = build_map(8, "sandwich-top", 3)
    plan = solver_plan(sharing, Recipe(forward_sweeps=1))
    graph = task_graph(SHAPE, plan, Placement(sharing, (4, 4), 2))
    for rank in best_schedule(graph, microbatches):
        first = [each.action for each in rank if each.action.forward]
        started = list(dict.fromkeys(action.microbatch for action in first))
        assert started == sorted(started)
    assert isinstance(first[0], Action)


def test_memory_of_the_fullest_rank() -> None:
    sharing = build_map(8, "pizza-bottom", 3)
    placed = Placement(sharing, (6, 2), 2)
    whole = TrainingMemory(weights=1000, gradients=2000, optimizer=4000, activations=800, logits=7)
    found = on_fullest_rank(whole, SHAPE, placed)
    own = stage_parameters(SHAPE, sharing, placed.stages[0]) / parameters(SHAPE, sharing)
    assert 0.6 < own < 0.9
    assert (found.weights, found.gradients) == (round(1000 * own), round(2000 * own))
    assert found.activations == 800 * 6 * 2 / 8 and found.logits == 7


def test_stages_hold_all_parameters() -> None:
    sharing = build_map(8, "sandwich-top", 3)
    stages = Placement(sharing, (3, 5), 2).stages
    held = sum(stage_parameters(SHAPE, sharing, stage) for stage in stages)
    copy_of_tied_head = SHAPE.vocab_size * SHAPE.hidden_size
    assert held == parameters(SHAPE, sharing) + copy_of_tied_head
