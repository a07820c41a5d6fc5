"""The pass plan: which steps a sweep has, what they may skip, and that every read is served."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.errors import MapError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.plan import ExecutionPlan, LayerStep, Segment, StepMode, Sweep
from megatron_kvshare.sharing.solver import jacobi_plan
from tests.unit.sharing.strategies import sharing_maps

FULL, NO_ATTENTION, KV_ONLY = StepMode.FULL, StepMode.NO_ATTENTION, StepMode.KV_ONLY
passes = st.tuples(st.integers(0, 4), st.integers(1, 3))


def steps_of(sweep: Sweep) -> tuple[LayerStep, ...]:
    """The steps of a sweep that takes all tokens at once, as every one does here."""
    (visit,) = sweep.visits
    assert (visit.offset, sweep.stride, sweep.finish) == (0, 1, ())
    return visit.steps


def modes(segment: Segment) -> list[list[StepMode]]:
    return [[step.mode for step in steps_of(sweep)] for sweep in segment.sweeps]


def test_an_acyclic_map_is_one_segment_with_one_sweep() -> None:
    (segment,) = jacobi_plan(build_map(22, "pizza-bottom", 11)).segments
    assert (segment.first, segment.last, segment.is_cyclic, segment.targets) == (0, 21, False, ())
    (sweep,) = segment.sweeps
    assert sweep.gradient
    assert sweep.last
    assert steps_of(sweep) == tuple(LayerStep(layer) for layer in range(22))


def test_sandwich_top_has_three_segments() -> None:
    plan = jacobi_plan(build_map(22, "sandwich-top", 11))
    assert [(s.first, s.last, len(s.sweeps)) for s in plan.segments] == [
        (0, 4, 1),
        (5, 16, 9),
        (17, 21, 1),
    ]
    (group,) = plan.groups
    assert group.targets == (16,)
    assert group.num_layers == 12
    assert [sweep.gradient for sweep in group.sweeps] == [False] * 7 + [True] * 2
    assert [sweep.last for sweep in group.sweeps] == [False] * 8 + [True]


def test_what_a_sweep_skips() -> None:
    (group,) = jacobi_plan(SharingMap.parse("3_1_3_3"), 1, 2).segments
    assert modes(group) == [
        [NO_ATTENTION, FULL, NO_ATTENTION, KV_ONLY],
        [FULL, FULL, FULL, KV_ONLY],
        [FULL, FULL, FULL, FULL],
    ]


def test_without_skipping_every_step_is_full() -> None:
    (group,) = jacobi_plan(SharingMap.parse("3_1_3_3"), 1, 2, skip=False).segments
    assert {mode for sweep in modes(group) for mode in sweep} == {FULL}


def test_a_single_sweep_is_first_and_last() -> None:
    (group,) = jacobi_plan(SharingMap.parse("1_1"), 0, 1).segments
    assert modes(group) == [[NO_ATTENTION, FULL]]


def test_several_targets_in_one_group() -> None:
    (group,) = jacobi_plan(SharingMap.parse("2_3_2_3")).segments
    assert group.targets == (2, 3)
    assert modes(group)[0] == [NO_ATTENTION, NO_ATTENTION, FULL, KV_ONLY]


def test_impossible_numbers_of_passes() -> None:
    with pytest.raises(MapError) as caught:
        jacobi_plan(build_map(4), -1, 0)
    assert len(caught.value.faults) == 2
    assert "--kv-forward-sweeps" in str(caught.value)
    assert "--kv-backward-sweeps" in str(caught.value)


@given(sharing_maps(), passes, st.booleans())
def test_segments_cover_every_layer_once_per_sweep(
    sharing: SharingMap, counts: tuple[int, int], skip: bool
) -> None:
    plan = jacobi_plan(sharing, *counts, skip=skip)
    covered = []
    for segment in plan.segments:
        layers = list(range(segment.first, segment.last + 1))
        covered += layers
        assert all([step.layer for step in steps_of(sweep)] == layers for sweep in segment.sweeps)
        assert [sweep.last for sweep in segment.sweeps].count(True) == 1
        assert segment.sweeps[-1].last
        assert len(segment.sweeps) == (sum(counts) if segment.is_cyclic else 1)
        assert sum(sweep.gradient for sweep in segment.sweeps) == (
            counts[1] if segment.is_cyclic else 1
        )
    assert covered == list(range(sharing.num_layers))
    assert tuple((s.first, s.last) for s in plan.groups) == sharing.cyclic_groups


@given(sharing_maps(), passes)
def test_every_read_is_served(sharing: SharingMap, counts: tuple[int, int]) -> None:
    """Run the plan on sets of layers: what a step reads has been produced."""
    plan = jacobi_plan(sharing, *counts)
    outside: set[int] = set()
    for segment in plan.segments:
        before: set[int] = set()
        for sweep in segment.sweeps:
            before = _run_sweep(plan, steps_of(sweep), outside, before)
        outside |= before  # the KV of the last sweep
    assert outside == set(sharing.producers)


def _run_sweep(
    plan: ExecutionPlan, steps: tuple[LayerStep, ...], outside: set[int], before: set[int]
) -> set[int]:
    sharing = plan.map
    produced: set[int] = set()
    for step in steps:
        source = sharing.sources[step.layer]
        if sharing.is_producer(step.layer):
            assert step.mode is not NO_ATTENTION
            assert step.mode is FULL or step is steps[-1], "hidden states would be missing"
            produced.add(step.layer)
        elif sharing.is_upward(step.layer):
            assert (step.mode is FULL) == bool(before), "no KV is read exactly in the first sweep"
            assert step.mode is NO_ATTENTION or source in before
        else:
            assert step.mode is FULL
            assert source in produced | outside
    return produced


@given(sharing_maps(), passes)
def test_the_last_sweep_is_whole(sharing: SharingMap, counts: tuple[int, int]) -> None:
    for segment in jacobi_plan(sharing, *counts).segments:
        final = {step.mode for step in steps_of(segment.sweeps[-1])}
        assert final <= ({FULL} if sum(counts) > 1 else {FULL, NO_ATTENTION})


@given(sharing_maps())
def test_targets_are_the_producers_upward_layers_read(sharing: SharingMap) -> None:
    plan = jacobi_plan(sharing)
    found = {target for segment in plan.segments for target in segment.targets}
    layers = range(sharing.num_layers)
    assert found == {sharing.sources[layer] for layer in layers if sharing.is_upward(layer)}
    for segment in plan.groups:
        assert segment.last in segment.targets
        assert all(segment.first < target <= segment.last for target in segment.targets)
