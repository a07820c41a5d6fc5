"""Recipes and the sweeps they make: notation, faults, structure, and that every read is served."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.costs.cost import prefill_work
from megatron_kvshare.errors import MapError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.plan import Carry, LayerStep, Segment, StepMode, Sweep
from megatron_kvshare.sharing.solver import (
    CONVERGED_PREFILL,
    RECIPES,
    Recipe,
    Solver,
    Start,
    Tolerance,
    recipe_name,
    solver_plan,
    with_more_sweeps,
)
from tests.recipes import jacobi, strided
from tests.unit.sharing.strategies import recipes, sharing_maps, tolerances
from tests.unit.sharing.symbolic import run_symbolically

NOTHING, GROUP_INPUT, KV, PROJECTED = Carry
FULL, NO_ATTENTION, KV_ONLY = StepMode.FULL, StepMode.NO_ATTENTION, StepMode.KV_ONLY
FIRST_CARRY = {Start.ZERO: NOTHING, Start.INPUT: GROUP_INPUT, Start.SELF: KV}
SANDWICH = build_map(8, "sandwich-top", 3)  # layers 1-6 are one group


def group_of(recipe: Recipe, tolerance: Tolerance | None = None) -> Segment:
    (group,) = solver_plan(SANDWICH, recipe, tolerance).groups
    return group


# ---- recipes ----


@pytest.mark.parametrize(
    ("recipe", "notation"),
    [
        (Recipe(), "jacobi(7, 2)"),
        (jacobi(2, 1, p=True), "jacobi(2, 1)p"),
        (jacobi(0, 2, "self", p=True), "jacobi(0, 2)p from self"),
        (RECIPES["two-sweep"], "strided(4; 1, 1)p"),
        (RECIPES["one-sweep"], "strided(4; 0, 1) from input"),
    ],
)
def test_notation(recipe: Recipe, notation: str) -> None:
    assert str(recipe) == notation


def test_recipes_with_a_name() -> None:
    assert list(RECIPES) == ["one-sweep", "two-sweep", "paper"]
    assert recipe_name(Recipe()) == "paper: jacobi(7, 2)"
    assert recipe_name(strided(4, 1, 1, p=True)) == "two-sweep: strided(4; 1, 1)p"
    assert recipe_name(strided(4, 0, 1, "input")) == "one-sweep: strided(4; 0, 1) from input"
    assert recipe_name(strided(8, 1, 1, p=True)) == "strided(8; 1, 1)p"


def test_earlier_names_find_their_recipe() -> None:
    assert RECIPES["cheapest"] == RECIPES["one-sweep"]
    assert RECIPES["fast"] == RECIPES["two-sweep"]
    with pytest.raises(KeyError, match="slow"):
        RECIPES["slow"]


@given(recipes())
def test_as_dict_round_trip(recipe: Recipe) -> None:
    values = recipe.as_dict()
    assert {type(value) for value in values.values()} <= {str, int, bool}
    assert Recipe.from_dict(values) == recipe
    earlier = {name.replace("_sweeps", "_passes"): value for name, value in values.items()}
    assert earlier.keys() != values.keys() and Recipe.from_dict(earlier) == recipe


@given(recipes(), recipes())
def test_different_recipes_have_different_notations(one: Recipe, other: Recipe) -> None:
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"forward_sweeps": -1}, ["--kv-forward-sweeps"]),
        ({"backward_sweeps": 0}, ["--kv-backward-sweeps"]),
        ({"stride": 4}, ["--kv-stride"]),
        ({"solver": Solver.STRIDED}, ["--kv-stride"]),
        ({"forward_sweeps": 0, "project_at_use": True}, ["--kv-project-at-use"]),
        (
            {"forward_sweeps": 0, "project_at_use": True, "start": Start.INPUT},
            ["--kv-project-at-use"],
        ),
        (
            {"forward_sweeps": -1, "backward_sweeps": 0, "stride": 0, "project_at_use": True},
            ["--kv-forward-sweeps", "--kv-backward-sweeps", "--kv-stride", "--kv-project-at-use"],
        ),
    ],
)
def test_impossible_recipes_name_every_fault(values: dict[str, object], flags: list[str]) -> None:
    with pytest.raises(MapError) as caught:
        Recipe(**values)  # type: ignore[arg-type]
    assert len(caught.value.faults) == len(flags)
    for flag, fault in zip(flags, caught.value.faults, strict=True):
        assert flag in str(fault)
        assert "Fix:" in str(fault)


def test_projection_at_use_after_a_start_sweep_is_possible() -> None:
    assert str(jacobi(0, 1, "self", p=True)) == "jacobi(0, 1)p from self"


# ---- structure ----


def test_strided_sweeps_of_a_known_map() -> None:
    (group,) = solver_plan(SharingMap.parse("3_1_3_3"), strided(2, 1, 1)).groups
    first, last = group.sweeps
    below = [LayerStep(1), LayerStep(2), LayerStep(3, KV_ONLY)]
    blind = (
        LayerStep(0, NO_ATTENTION),
        LayerStep(1),
        LayerStep(2, NO_ATTENTION),
        LayerStep(3, KV_ONLY),
    )
    assert [visit.offset for visit in first.visits] == [0, 1]
    assert first.visits[0].steps == blind
    assert first.visits[1].steps == (LayerStep(0), *below)
    assert [visit.steps for visit in last.visits] == [(LayerStep(0), *below)] * 2
    assert (first.finish, last.finish) == ((), (LayerStep(3, StepMode.KV_GIVEN),))
    assert (first.gradient, last.gradient, first.last, last.last) == (False, True, False, True)
    assert (first.carry, last.carry) == (NOTHING, KV)
    assert first.carried == last.carried == (1, 3)


def solved(sweeps: tuple[Sweep, ...], recipe: Recipe) -> tuple[Sweep, ...]:
    return sweeps[1:] if recipe.start is Start.SELF else sweeps


@given(sharing_maps(), recipes())
def test_visits_and_finish(sharing: SharingMap, recipe: Recipe) -> None:
    top_reads = StepMode.KV_GIVEN
    for group in solver_plan(sharing, recipe).groups:
        layers = list(range(group.first, group.last + 1))
        sweeps = solved(group.sweeps, recipe)
        assert len(sweeps) == recipe.forward_sweeps + recipe.backward_sweeps
        assert [sweep.last for sweep in group.sweeps] == [False] * (len(group.sweeps) - 1) + [True]
        for sweep in sweeps:
            assert [visit.offset for visit in sweep.visits] == list(range(recipe.stride))
            assert all([s.layer for s in visit.steps] == layers for visit in sweep.visits)
            finishes = sweep.last and recipe.stride > 1
            assert sweep.finish == ((LayerStep(group.last, top_reads),) if finishes else ())
        given_modes = {s.mode for sweep in sweeps for visit in sweep.visits for s in visit.steps}
        assert given_modes <= {FULL, NO_ATTENTION, KV_ONLY}


@given(sharing_maps(), recipes())
def test_a_start_of_its_own_is_one_parallel_sweep(sharing: SharingMap, recipe: Recipe) -> None:
    for group in solver_plan(sharing, recipe).groups:
        own = {s.mode for sweep in group.sweeps for visit in sweep.visits for s in visit.steps}
        assert (StepMode.OWN_INPUT in own) == (recipe.start is Start.SELF)
        if recipe.start is Start.SELF:
            start = group.sweeps[0]
            assert (start.stride, start.carry, start.gradient) == (1, NOTHING, False)
            for step in start.visits[0].steps:
                upward = sharing.is_upward(step.layer)
                expected = StepMode.OWN_INPUT if upward else FULL
                assert step.mode is (KV_ONLY if step.layer == group.last else expected)


@given(sharing_maps(), recipes())
def test_carry_and_gradient_of_every_sweep(sharing: SharingMap, recipe: Recipe) -> None:
    m, b = recipe.forward_sweeps, recipe.backward_sweeps
    carries = [FIRST_CARRY[recipe.start], *[KV] * (m + b - 1)]
    if recipe.project_at_use:
        carries[m] = PROJECTED
    for group in solver_plan(sharing, recipe).groups:
        sweeps = solved(group.sweeps, recipe)
        assert [sweep.carry for sweep in sweeps] == carries
        assert [sweep.gradient for sweep in sweeps] == [False] * m + [True] * b
        kept = [number for number, sweep in enumerate(group.sweeps) if sweep.keep_inputs]
        before_gradient = m + (recipe.start is Start.SELF) - 1
        assert kept == ([before_gradient] if recipe.project_at_use else [])
        assert all(sweep.skip_below is None for sweep in group.sweeps)


# ---- tolerance ----


@given(recipes(), tolerances())
def test_a_tolerance_may_skip_from_its_least_to_its_most(
    recipe: Recipe, tolerance: Tolerance
) -> None:
    sweeps = solved(group_of(recipe, tolerance).sweeps, recipe)
    least, most, b = tolerance.least, tolerance.most, recipe.backward_sweeps
    limits = [None] * least + [tolerance.residual] * (most - least) + [None] * b
    assert [sweep.skip_below for sweep in sweeps] == limits
    assert [sweep.gradient for sweep in sweeps] == [False] * most + [True] * b


def test_inputs_are_kept_by_every_sweep_that_may_be_the_last_without_gradient() -> None:
    def kept(recipe: Recipe, least: int, most: int) -> list[bool]:
        tolerance = Tolerance(residual=0.1, least=least, most=most)
        return [sweep.keep_inputs for sweep in group_of(recipe, tolerance).sweeps]

    two = RECIPES["two-sweep"]
    assert kept(two, 2, 4) == [False, True, True, True, False]
    assert kept(two, 3, 3) == [False, False, True, False]
    assert kept(two, 1, 2) == [True, True, False]
    assert kept(strided(4, 0, 1, "self", p=True), 0, 2) == [True, True, True, False]
    assert kept(strided(4, 0, 1, "self", p=True), 1, 2) == [False, True, True, False]
    assert kept(strided(4, 1, 1), 2, 4) == [False] * 5


# ---- execution on sets ----


@given(
    sharing_maps(),
    recipes(),
    st.none() | tolerances(),
    st.integers(0, 4),
    st.booleans(),
)
def test_every_read_is_served(
    sharing: SharingMap, recipe: Recipe, tolerance: Tolerance | None, run: int, skip: bool
) -> None:
    """Also where sweeps are left out: all that may be, after ``run`` of them have run."""
    plan = solver_plan(sharing, recipe, tolerance, skip=skip)
    assert run_symbolically(plan, skippable_run=run) == set(sharing.producers)


def test_a_converged_prefill_is_cheap() -> None:
    """The limit it was measured for: 1.7 times the layers of a standard prefill."""
    plan = solver_plan(build_map(8, "sandwich-top", 3), CONVERGED_PREFILL)
    assert 1 < prefill_work(plan) <= 1.7


def test_what_to_try_has_more_sweeps() -> None:
    assert with_more_sweeps(RECIPES["one-sweep"]) == "--kv-recipe two-sweep or paper"
    assert with_more_sweeps(RECIPES["two-sweep"]) == "--kv-recipe paper"
    assert with_more_sweeps(RECIPES["paper"]) == ""
    assert with_more_sweeps(Recipe(forward_sweeps=1)) == "--kv-recipe two-sweep or paper"
