"""Recipes on every layout: losses, gradients by name and evaluations equal one rank's."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_kvshare.sharing.patterns import build_map
from tests.distributed import jobs
from tests.distributed.jobs import Case, Trained
from tests.distributed.test_parallel import (
    LAYOUTS,
    PACKED,
    Reference,
    assert_dropped_gradient_is_seen,
    assert_same_training,
)
from tests.distributed.world import Layout, World
from tests.product import assert_close_by_name

MAPS = {
    "sandwich-top": {"kv_pattern": "sandwich-top", "kv_layers": 3},
    "sandwich-middle": {"kv_pattern": "sandwich-middle", "kv_layers": 3},
    "lasagna-top": {"kv_pattern": "lasagna-top", "kv_layers": 3},
    "several-targets": {"kv_map": "0_5_3_3_6_5_6_3"},
    "windowed": {"kv_map": "0s_4_4s_4_4s_0s_7s_7"},
}
RECIPES = {
    "two-sweep": {"kv_recipe": "two-sweep"},
    "one-sweep": {"kv_recipe": "one-sweep"},
    "self": {"kv_recipe": "two-sweep", "kv_stride": 2, "kv_start": "self"},
}
SPREAD = ["tp2-sp", "tp4-over-kv-heads-sp", "dp2-sharded", "tp2-sp-dp2-sharded"]


def case_of(kv_map: str, recipe: str, kv_heads: int = 4, steps: int = 1, **settings) -> Case:
    sharing = {**MAPS[kv_map], **RECIPES[recipe]}
    return Case(sharing=sharing, kv_heads=kv_heads, steps=steps, **settings)


@pytest.fixture(scope="module")
def one_rank(single) -> Reference:
    """Results of this process alone, computed once per case."""

    @cache
    def run(kv_map: str, recipe: str, kv_heads: int) -> Trained:
        return jobs.train(single, Layout(), case_of(kv_map, recipe, kv_heads, steps=10))

    return run


SAMPLE = {
    *(("sandwich-top", "two-sweep"), ("windowed", "one-sweep"), ("several-targets", "self")),
    *(("tp2-sp-dp2-sharded", "two-sweep"), ("tp4-over-kv-heads-sp", "self")),
}
"""Pairs that every change must pass; the others are nightly."""
PAIRS = [
    pytest.param(kv_map, recipe, marks=() if (kv_map, recipe) in SAMPLE else pytest.mark.nightly)
    for kv_map in MAPS
    for recipe in RECIPES
]


@pytest.mark.parametrize(("kv_map", "recipe"), PAIRS)
@pytest.mark.parametrize("layout", SPREAD)
def test_layout_trains_like_one_rank(layout, recipe, kv_map, world: World, one_rank):
    spread, kv_heads, _, parallel = LAYOUTS[layout]
    steps = 10 if spread == Layout(2, 2, True) else 1
    case = case_of(kv_map, recipe, kv_heads, steps, parallel=parallel)
    assert_same_training(world.run(jobs.train, spread, case), one_rank(kv_map, recipe, kv_heads))


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("recipe", ["two-sweep", "self"])
def test_recompute_changes_nothing_under_tensor_parallelism(recipe, granularity, world: World):
    layout = Layout(2, sequence_parallel=True)
    plain = world.run(jobs.train, layout, case_of("several-targets", recipe))[0]
    model = {"recompute_granularity": granularity, "recompute_num_layers": None}
    case = case_of("several-targets", recipe, model=model)
    recomputed = world.run(jobs.train, layout, case)[0]
    assert recomputed.losses == plain.losses
    assert_close_by_name(recomputed.gradients, plain.gradients, 1e-6)


@pytest.mark.parametrize("recipe", ["two-sweep", "one-sweep"])
def test_packed_documents(recipe, world: World, single):
    case = case_of("sandwich-top", recipe, data=PACKED)
    layout = Layout(2, 2, sequence_parallel=True)
    got = world.run(jobs.train, layout, case)
    assert_same_training(got, jobs.train(single, Layout(), case))


def test_a_dropped_gradient_is_seen(single, one_rank):
    """Cutting what one upward layer reads: same loss, other gradients of the target."""
    case = case_of("sandwich-top", "two-sweep")
    mutated = jobs.train_without_one_consumer(single, Layout(), case, 5)
    reference = one_rank("sandwich-top", "two-sweep", 4)
    assert_dropped_gradient_is_seen(mutated, reference, build_map(8, "sandwich-top", 3), 5)


EVALUATIONS = [
    pytest.param(layout, recipe, marks=() if (layout, recipe) in SAMPLE else pytest.mark.nightly)
    for layout in ("tp2-sp", "tp4-over-kv-heads-sp", "tp2-sp-dp2-sharded")
    for recipe in RECIPES
]


@pytest.mark.parametrize(("layout", "recipe"), EVALUATIONS)
def test_evaluation_is_the_same_everywhere(layout, recipe, world: World, single):
    """All ranks repeat sweeps equally often, as often as one rank does, and report its numbers."""
    spread, kv_heads, _, parallel = LAYOUTS[layout]
    # Stiff weights: the passes have something to converge from.
    settings = {"train": {"eval_iters": 2}, "model": {"init_method_std": 0.1}}
    sharing = {"kv_tolerance": 0.02, "kv_max_sweeps": 9, **MAPS["several-targets"]}
    case = Case(
        sharing={**sharing, **RECIPES[recipe]}, kv_heads=kv_heads, parallel=parallel, **settings
    )
    alone = jobs.evaluate(single, Layout(), Case(**{**vars(case), "parallel": {}}))
    assert len(alone.kv_residuals) > 2 and alone.kv_gap != 0
    for rank in world.run(jobs.evaluate, spread, case):
        assert rank.loss == pytest.approx(alone.loss, rel=1e-5)
        assert rank.kv_gap == pytest.approx(alone.kv_gap, abs=1e-5)
        assert len(rank.kv_residuals) == len(alone.kv_residuals)
        assert rank.kv_residuals == pytest.approx(alone.kv_residuals, rel=1e-3, abs=1e-6)
