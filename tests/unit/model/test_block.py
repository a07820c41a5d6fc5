"""What the block reports and which layers it runs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import Carry, ExecutionPlan, StepMode
from megatron_kvshare.sharing.solver import RECIPES, Recipe, Start, Tolerance, solver_plan
from tests.maps import named_maps, random_maps
from tests.product import Tiny, load_by_name, random_tokens

TINY = Tiny()
LENGTH = 8


def residuals(sharing: SharingMap, single, passes: tuple[int, int]):
    model = TINY.model(sharing, single, passes)
    load_by_name(model, TINY.weights(sharing))
    tokens = random_tokens(TINY.vocabulary, 2, LENGTH)
    with torch.no_grad():
        return model(tokens, measure_residual=True).residuals


@pytest.mark.parametrize("kv_map", ["0_3_3_3", "2_3_2_3", "1_1_3_3"])
def test_residual_falls_to_zero_once_all_tokens_are_exact(kv_map, single):
    sharing = SharingMap.parse(kv_map)
    first, second, exact = (residuals(sharing, single, (n - 1, 1)) for n in (1, 2, LENGTH + 1))
    for n, rows in ((1, first), (2, second), (LENGTH + 1, exact)):
        assert rows.shape == (len(sharing.cyclic_groups), n, 2)
    # Before the first pass there is nothing: the change is all there is.
    assert torch.equal(first[..., 0], first[..., 1])
    assert torch.equal(second[0, 0], first[0, 0])  # a group above another gets another input
    assert (second[:, 1, 0] < second[:, 1, 1]).all() and (second[:, 1, 0] > 0).all()
    assert (exact[:, -1, 0] <= 1e-12 * exact[:, -1, 1]).all()


def test_residual_of_a_map_without_groups_is_none(single):
    assert residuals(SharingMap.parse("0_0_2_2"), single, (1, 1)) is None


PLANS = {
    "jacobi": Recipe(forward_sweeps=3),
    "two-sweep": RECIPES["two-sweep"],
    "one-sweep": RECIPES["one-sweep"],
    "self": Recipe(forward_sweeps=1, backward_sweeps=1, start=Start.SELF),
}
METHODS = ("forward", "key_values", "feed_forward", "read_own")
Ran = Counter[tuple[str, int]]


@pytest.mark.parametrize(
    "sharing",
    [*named_maps(8).values(), *random_maps(8, 4).values()],
    ids=[*named_maps(8), *random_maps(8, 4)],
)
def test_runs_exactly_the_steps_of_the_plan(sharing, single, monkeypatch):
    ran: Ran = Counter()
    model = TINY.model(sharing, single)
    load_by_name(model, TINY.weights(sharing))
    layers = {id(layer): index for index, layer in enumerate(model.decoder.layers)}

    def watch(method: str) -> None:
        plain = getattr(KVShareLayer, method)

        def run(self, *arguments):
            ran[method, layers[id(self)]] += 1
            return plain(self, *arguments)

        monkeypatch.setattr(KVShareLayer, method, run)

    for method in METHODS:
        watch(method)
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    for name, recipe in PLANS.items():
        plan = solver_plan(sharing, recipe)
        ran.clear()
        model(tokens, plan=plan)
        assert +ran == +planned(plan), name


def planned(plan: ExecutionPlan) -> Ran:
    """How often a plan asks for each part of each layer."""
    expected: Ran = Counter()
    for sweep in (sweep for segment in plan.segments for sweep in segment.sweeps):
        if sweep.carry in (Carry.GROUP_INPUT, Carry.PROJECTED):
            expected.update({("key_values", layer): sweep.stride for layer in sweep.carried})
        for step in (*(s for visit in sweep.visits for s in visit.steps), *sweep.finish):
            if step.mode is StepMode.KV_ONLY:
                expected["key_values", step.layer] += 1
                continue
            expected["feed_forward", step.layer] += 1
            expected["forward", step.layer] += step.mode in (StepMode.FULL, StepMode.OWN_INPUT)
            expected["read_own", step.layer] += step.mode is StepMode.KV_GIVEN
            if step.mode is StepMode.OWN_INPUT:
                expected["key_values", plan.map.sources[step.layer]] += 1
    return expected


def test_a_tolerance_ends_the_sweeps_that_have_converged(single):
    sharing = SharingMap.parse("0_3_3_3")
    model = TINY.model(sharing, single)
    load_by_name(model, TINY.weights(sharing))
    tokens = random_tokens(TINY.vocabulary, 2, LENGTH)

    def rows(residual: float) -> torch.Tensor:
        tolerance = Tolerance(residual=residual, least=2, most=6)
        plan = solver_plan(sharing, Recipe(backward_sweeps=1), tolerance)
        with torch.no_grad():
            return model(tokens, plan=plan, measure_residual=True).residuals[0]

    every = rows(1e-30)
    moved = (every[:, 0] / every[:, 1]).sqrt().tolist()
    assert len(moved) == 7 and all(every[:, 1] > 0)
    # Between what sweeps 3 and 4 move: the fifth and sixth are left out, the last one is not.
    assert moved[3] < moved[2]
    some = rows((moved[2] + moved[3]) / 2)
    assert torch.equal(some[:4], every[:4])
    assert (some[4:6] == 0).all()
    assert some[6, 1] > 0
    loose = rows(10.0)
    assert [bool(row[1] > 0) for row in loose] == [True] * 2 + [False] * 4 + [True]
