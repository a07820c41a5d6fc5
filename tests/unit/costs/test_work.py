"""Costs of every recipe: layer-forwards, depth, and the attention of strided sweeps."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.costs import cost
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.work import (
    carry_work,
    finish_work,
    head_work,
    plan_work,
    step_flops,
    visit_work,
)
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.plan import Carry, LayerStep, StepMode, Sweep, Visit
from megatron_kvshare.sharing.solver import RECIPES, Recipe, Solver, Start, solver_plan
from megatron_kvshare.stages.placement import PayloadShape, Placement
from megatron_kvshare.stages.task_cost import task_graph
from megatron_kvshare.tables.stages import stage_work
from tests.unit.sharing.strategies import recipes, sharing_maps


def jacobi(forward: int, backward: int) -> Recipe:
    return Recipe(forward_sweeps=forward, backward_sweeps=backward)


def strided(stride: int, forward: int, backward: int, start: Start = Start.ZERO) -> Recipe:
    return Recipe(
        solver=Solver.STRIDED,
        stride=stride,
        forward_sweeps=forward,
        backward_sweeps=backward,
        start=start,
    )


TWO_SWEEP, ONE_SWEEP = RECIPES["two-sweep"], RECIPES["one-sweep"]


@pytest.mark.parametrize(
    ("num_layers", "pattern", "kv_layers", "recipe", "work"),
    [
        (8, "sandwich-top", 3, jacobi(7, 2), 3.08),
        (8, "sandwich-top", 3, jacobi(1, 2), 1.83),
        (8, "sandwich-top", 3, TWO_SWEEP, 1.21),
        (8, "sandwich-top", 3, ONE_SWEEP, 1.00),
        (8, "sandwich-top", 3, jacobi(2, 1), 1.42),
        (8, "sandwich-top", 3, jacobi(0, 2), 1.62),
        (8, "sandwich-middle", 3, jacobi(7, 2), 1.83),
        (8, "sandwich-middle", 3, jacobi(1, 2), 1.33),
        (8, "sandwich-middle", 3, TWO_SWEEP, 1.08),
        (22, "sandwich-top", 3, strided(4, 1, 1), 1.29),
        (22, "sandwich-top", 11, strided(4, 1, 1), 1.17),
        (22, "sandwich-middle", 3, strided(4, 1, 1), 1.14),
    ],
    ids=str,
)
def test_training_work(
    num_layers: int, pattern: str, kv_layers: int, recipe: Recipe, work: float
) -> None:
    plan = solver_plan(build_map(num_layers, pattern, kv_layers), recipe)
    assert cost.train_work(plan) == pytest.approx(work, abs=0.0051)


@pytest.mark.parametrize(
    ("recipe", "work"),
    [(jacobi(3, 1), 2.88), (strided(4, 1, 1), 1.62), (strided(4, 2, 1), 2.25)],
    ids=str,
)
def test_prefill_work(recipe: Recipe, work: float) -> None:
    plan = solver_plan(build_map(8, "sandwich-top", 3), recipe)
    assert cost.prefill_work(plan) == pytest.approx(work, abs=0.0051)


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (jacobi(7, 2), 2 + 8 * 5 + 6),
        (TWO_SWEEP, 2 + 2 * 4 * 5 + 1),
        (ONE_SWEEP, 2 + 4 * 5 + 1),
        (Recipe(forward_sweeps=0, backward_sweeps=1, start=Start.SELF), 2 + 5 + 6),
    ],
    ids=str,
)
def test_sequential_depth(recipe: Recipe, steps: int) -> None:
    """Two layers outside the group of six, of whose top most sweeps only need keys and values."""
    plan = solver_plan(build_map(8, "sandwich-top", 3), recipe)
    assert cost.sequential_depth(plan) == pytest.approx(steps / 8)


@given(sharing_maps(), recipes())
def test_work_is_the_factor_less_what_tops_skip(sharing: SharingMap, recipe: Recipe) -> None:
    plan = solver_plan(sharing, recipe)
    skipped = 0
    for group in plan.groups:
        skipped += sum(3 if sweep.gradient else 1 for sweep in group.sweeps[:-1])
    factor = cost.train_factor(plan) - cost.train_work(plan)
    assert factor == pytest.approx(skipped / (3 * sharing.num_layers))
    assert cost.sequential_depth(plan) >= cost.prefill_work(plan) - 1e-9
    if recipe.stride == 1:
        assert cost.sequential_depth(plan) == pytest.approx(cost.prefill_work(plan))


# ---- FLOPs of strided sweeps ----

QUERY_WIDTH, HIDDEN, KV_WIDTH = 8, 8, 4


def small(num_layers: int, length: int, window: int | None) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=20,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=30,
        seq_length=length,
        window_size=window,
    )


def pairs(shape: ModelShape, sharing: SharingMap, sweep: Sweep, visit: Visit, layer: int) -> int:
    """Queries of a visit and the keys they find, counted one by one."""
    upward, source = sharing.is_upward(layer), sharing.sources[layer]
    window = shape.window_size if sharing.windowed[layer] else None
    reach = shape.seq_length if window is None else window
    inside = source in {step.layer for step in visit.steps}
    there = sweep.stride
    if sweep.carry is Carry.NOTHING and inside:
        there = visit.offset if upward else visit.offset + 1
    return sum(
        query - reach < key <= query - upward and key % sweep.stride < there
        for query in range(visit.offset, shape.seq_length, sweep.stride)
        for key in range(shape.seq_length)
    )


def visit_flops(shape: ModelShape, sharing: SharingMap, sweep: Sweep, visit: Visit) -> int:
    tokens = len(range(visit.offset, shape.seq_length, sweep.stride))
    total = 0
    for step in visit.steps:
        total += step_flops(shape, sharing, step, tokens, pairs=0)
        if step.mode is StepMode.FULL:
            total += 4 * QUERY_WIDTH * pairs(shape, sharing, sweep, visit, step.layer)
    return total


@given(
    st.sampled_from(["0_4_4_4_4", "0_4_2_2_4", "0_4s_4_0s_4s", "2_2s_2", "3s_1s_1s_3"]),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 1),
    st.none() | st.integers(1, 9),
    st.sampled_from(Start),
)
def test_strided_attention_is_counted_pair_by_pair(
    notation: str, stride: int, rounds: int, ragged: int, window: int | None, start: Start
) -> None:
    sharing = SharingMap.parse(notation)
    length = stride * rounds - ragged
    shape = small(sharing.num_layers, length, window)
    (group,) = solver_plan(sharing, strided(stride, 1, 1, start)).groups
    for sweep in group.sweeps[-2:]:
        for visit in sweep.visits:
            found = sum(each.forward for each in visit_work(shape, sharing, sweep, visit))
            assert found == visit_flops(shape, sharing, sweep, visit)
        expected = 0
        for step in sweep.finish:
            whole = Visit((LayerStep(step.layer),))
            seen = pairs(shape, sharing, Sweep((whole,), True, True), whole, step.layer)
            expected += step_flops(shape, sharing, step, length, pairs=0) + 4 * QUERY_WIDTH * seen
        assert sum(each.forward for each in finish_work(shape, sharing, sweep)) == expected


def test_carried_keys_and_values_are_counted() -> None:
    """From the group's input: one projection per target; with gradient three times as much."""
    sharing, shape = SharingMap.parse("1_1"), small(2, 8, None)
    projection = 2 * HIDDEN * 2 * KV_WIDTH

    def extra(recipe: Recipe) -> float:
        (group,) = solver_plan(sharing, recipe).groups
        return (
            sum(
                each.training
                for sweep in group.sweeps
                for each in carry_work(shape, sweep, sweep.carried)
            )
            / 8
        )

    assert extra(strided(4, 1, 1)) == 0
    assert extra(ONE_SWEEP) == 3 * projection
    assert extra(strided(4, 1, 1, Start.INPUT)) == projection
    assert extra(TWO_SWEEP) == 3 * projection  # its input is a constant, the norm before it not


# ---- sums ----


@given(sharing_maps(min_layers=4), recipes(), st.sets(st.integers(1, 3), max_size=3), st.data())
def test_every_sum_is_the_plan_s(
    sharing: SharingMap, recipe: Recipe, cuts: set[int], data: st.DataObject
) -> None:
    """Of stages, of tasks on all stages, and of the tasks of one stage, to the last FLOP."""
    window = data.draw(st.none() | st.integers(1, 9))
    shape = small(sharing.num_layers, data.draw(st.integers(1, 13)), window)
    plan = solver_plan(sharing, recipe)
    edges = [0, *sorted(cuts), sharing.num_layers]
    layout = tuple(stop - first for first, stop in itertools.pairwise(edges))
    placed = Placement(sharing, layout, len(layout))
    total = cost.train_flops_per_token(shape, plan) * shape.seq_length
    stages = stage_work(plan, placed, PayloadShape(shape, 1, 4))
    assert sum(stages) == round(total) and total == pytest.approx(sum(stages), rel=1e-12)
    if recipe.start is Start.SELF and placed.spanning_groups:
        return  # such a group is not cut
    graph = task_graph(shape, plan, placed)
    of_stages = [0] * len(layout)
    for task, forward, backward in zip(
        graph.tasks, graph.forward_cost, graph.backward_cost, strict=True
    ):
        of_stages[task.stage.number] += forward + backward
        assert task.gradient or not backward
    assert of_stages == stages
    forward = sum(each.forward for each in plan_work(shape, plan)) + head_work(shape).forward
    assert sum(graph.forward_cost) == forward
