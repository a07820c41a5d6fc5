"""DeepSpeed's ZeRO trains what megatron-core's data parallelism trains: losses, norms, weights.

Sequences lose different numbers of tokens to the loss mask, so that every rank and microbatch
counts another; clipping is active in every step. Under ZeRO 3 every weight is divided, gathered for
every use and released after it (tests/zero).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.distributed import deepspeed_jobs as jobs
from tests.distributed.deepspeed_jobs import Held, Outcome
from tests.distributed.jobs import Case
from tests.distributed.world import Layout, World
from tests.maps import named_maps
from tests.zero import settings_of

MAPS = {name: each.notation for name, each in named_maps(4).items()}
DP2, TP2_DP2 = Layout(data=2), Layout(tensor=2, data=2, sequence_parallel=True)
STANDARD, BOTTOM, MIDDLE, TOP = (
    "standard",
    "pizza-bottom.l2",
    "sandwich-middle.l2",
    "lasagna-top.l1",
)


def case(name: str, steps: int, **sections: Any) -> Case:
    """Global batches of two microbatches of two sequences on each of two replicas."""
    train = {"global_batch_size": 8, "micro_batch_size": 2, "clip_grad": 0.7}
    model = {"num_layers": 4, **sections.pop("model", {})}
    train |= sections.pop("train", {})
    sharing = {"kv_map": MAPS[name], **sections.pop("sharing", {})}
    return Case(sharing=sharing, steps=steps, train=train, model=model, **sections)


def by_deepspeed(case: Case, stage: int, **more: Any) -> Case:
    settings = {**settings_of(stage), **more}
    return replace(case, deepspeed=settings)


@pytest.fixture(scope="module")
def by_megatron(world: World) -> Callable[[Layout, Case], Outcome]:
    """Runs of the megatron engine, each made once."""
    made: dict[str, Outcome] = {}

    def get(layout: Layout, case: Case) -> Outcome:
        key = f"{layout} {case}"
        if key not in made:
            made[key] = world.run(jobs.train, layout, case)[0]
        return made[key]

    return get


def relative_difference(found: Outcome, wanted: Outcome) -> tuple[float, float, float]:
    """The largest of losses, of norms and, in relative norm, of weights."""
    losses, norms = (
        max(abs(x - y) / abs(y) for x, y in zip(found[i], wanted[i], strict=True)) for i in (0, 1)
    )
    assert found.weights.keys() == wanted.weights.keys()
    weights = (
        float((found.weights[name] - each).float().norm() / each.float().norm())
        for name, each in wanted.weights.items()
    )
    return losses, norms, max(weights)


Check = Callable[..., None]


@pytest.fixture
def check(world: World, by_megatron: Callable[[Layout, Case], Outcome]) -> Check:
    def compare(
        layout: Layout, case: Case, stage: int, tolerance: float = 1e-5, **more: Any
    ) -> None:
        wanted = by_megatron(layout, case)
        assert min(wanted.norms) > case.train["clip_grad"], "nothing is clipped"
        outcomes = world.run(jobs.train, layout, by_deepspeed(case, stage, **more))
        assert all(each.losses == outcomes[0].losses for each in outcomes)
        losses, norms, weights = relative_difference(outcomes[0], wanted)
        assert losses < tolerance and norms < 10 * tolerance and weights < 10 * tolerance

    return compare


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks(check: Check, stage: int) -> None:
    check(DP2, case(MIDDLE, 4, sharing={"kv_recipe": "two-sweep"}), stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_tensor_and_sequence_parallelism(check: Check, stage: int) -> None:
    check(TP2_DP2, case(TOP, 4), stage)


RECIPES = [
    (STANDARD, {}),
    *((name, {}) for name in (BOTTOM, MIDDLE, TOP)),
    *((name, {"kv_recipe": "two-sweep"}) for name in (MIDDLE, TOP)),
]


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("name", "sharing"), RECIPES, ids=str)
def test_twenty_steps_on_two_ranks(
    check: Check, name: str, sharing: dict[str, Any], stage: int
) -> None:
    check(DP2, case(name, 20, sharing=sharing), stage)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("name", "sharing"), RECIPES, ids=str)
@pytest.mark.parametrize("layout", [TP2_DP2, Layout(tensor=2, data=2)], ids=str)
def test_twenty_steps_under_tensor_parallelism(
    check: Check, layout: Layout, name: str, sharing: dict[str, Any], stage: int
) -> None:
    check(layout, case(name, 20, sharing=sharing), stage)


RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform"}
OTHERS = {
    "recompute": {"model": {**RECOMPUTED, "recompute_num_layers": 1}},
    "recompute attention": {"model": {"recompute_granularity": "selective"}},
    "one microbatch": {"train": {"global_batch_size": 4}},
    "four microbatches": {"train": {"micro_batch_size": 1}},
    "tied head": {"model": {"untie_embeddings_and_output_weights": False}},
    "untied head": {"model": {"untie_embeddings_and_output_weights": True}},
    "rarer KV heads than ranks": {"kv_heads": 1},
}


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("what", OTHERS)
def test_twenty_steps_otherwise(check: Check, what: str, stage: int) -> None:
    layout = TP2_DP2 if stage and "heads" in what else DP2
    check(layout, case(MIDDLE, 20, **OTHERS[what]), stage)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", [DP2, TP2_DP2], ids=str)
def test_twenty_steps_in_bf16(check: Check, layout: Layout, stage: int) -> None:
    check(layout, case(MIDDLE, 20, model={"bf16": True}), stage, tolerance=2e-3)


@pytest.mark.parametrize(
    ("trap", "layout"),
    [
        ("the norm without what other tensor-parallel ranks hold", TP2_DP2),
        ("gradients of norms under sequence parallelism left apart", TP2_DP2),
        ("the mean of the means of ranks", DP2),
    ],
    ids=str,
)
def test_the_suite_sees_traps(
    world: World, by_megatron: Callable[[Layout, Case], Outcome], trap: str, layout: Layout
) -> None:
    tried = (
        case(TOP, 4) if layout == TP2_DP2 else case(MIDDLE, 4, sharing={"kv_recipe": "two-sweep"})
    )
    found = world.run(jobs.train_in_trap, layout, by_deepspeed(tried, 2), trap)[0]
    losses, norms, weights = relative_difference(found, by_megatron(layout, tried))
    assert losses > 1e-5 or norms > 1e-4 or weights > 1e-4


@pytest.mark.parametrize(
    "stage",
    [pytest.param(0, marks=pytest.mark.nightly), pytest.param(1, marks=pytest.mark.nightly), 2, 3],
)
def test_what_zero_divides(world: World, stage: int) -> None:
    ranks: list[Held] = world.run(jobs.held, DP2, by_deepspeed(case(MIDDLE, 1), stage))
    for each in ranks:
        assert each.whole == (0 if stage == 3 else each.weights)
        share = 2 if stage else 1
        assert each.moments == pytest.approx(2 * each.weights / share, rel=1e-2)
        assert each.updated == pytest.approx(each.weights / share, rel=1e-2)
    assert sum(each.updated for each in ranks) == ranks[0].weights * (1 if stage else 2)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_to_the_host(check: Check, stage: int) -> None:
    """On a CPU it moves nothing, and takes another way through DeepSpeed."""
    run = case(TOP, 5)
    check(DP2, run, stage, zero_offload="cpu")
