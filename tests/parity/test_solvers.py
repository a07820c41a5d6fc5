"""Every recipe: its fixed point is token by token, its loss and gradients are the naive model's."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.model import context
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES, Recipe, Tolerance, solver_plan
from tests.parity.cases import each_map, one_of_each_pattern
from tests.product import (
    Tiny,
    assert_close_by_name,
    load_by_name,
    loss_and_gradients,
    random_tokens,
    relative_differences,
)
from tests.recipes import jacobi, strided
from tests.swept_oracle import Way, swept_loss_and_gradients

TINY = Tiny()
LENGTH = 11
TOLERANCE = 1e-5


TRAINED = {
    "two-sweep": RECIPES["two-sweep"],
    "one-sweep": RECIPES["one-sweep"],
    "strided-zero": strided(3, 0, 2),
    "strided-self": strided(2, 1, 1, "self"),
    "strided-self-projected": strided(3, 0, 1, "self", p=True),
    "strided-input-projected": strided(4, 1, 2, "input", p=True),
    "jacobi-projected": jacobi(2, 1, p=True),
    "jacobi-input": jacobi(0, 2, "input"),
    "jacobi-self": jacobi(1, 1, "self"),
}
STARTS = ("zero", "input", "self")


def way_of(recipe: Recipe) -> Way:
    return Way(
        recipe.stride,
        recipe.forward_sweeps,
        recipe.backward_sweeps,
        str(recipe.start),
        recipe.project_at_use,
    )


def model_with(tiny: Tiny, sharing: SharingMap, single):
    weights = tiny.weights(sharing)
    model = tiny.model(sharing, single)
    load_by_name(model, weights)
    return model, weights


@torch.no_grad()
def logits_of(model, tokens, plan, **where):
    return model(tokens, plan=plan, **where).value[..., : model.spec.vocab_size]


def assert_exact_as_far_as_sweeps_reach(sharing: SharingMap, single) -> None:
    """After n sweeps over G subsets the first n x G tokens are exact, whatever the start."""
    model, weights = model_with(TINY, sharing, single)
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    exact = TINY.oracle(sharing, weights).token_by_token(tokens)
    for stride, start in ((1, "input"), (1, "self"), *((g, s) for g in (2, 4) for s in STARTS)):
        for sweeps in (1, 2, -(-LENGTH // stride)):
            passes = (sweeps - 1, 1, start)
            recipe = jacobi(*passes) if stride == 1 else strided(stride, *passes)
            logits = logits_of(model, tokens, solver_plan(sharing, recipe))
            difference = (logits - exact)[:, : sweeps * stride].abs().max()
            assert difference <= TOLERANCE * exact.abs().max(), (stride, start, sweeps)


@each_map(8, cyclic=True)
def test_sweeps_equal_token_by_token_as_far_as_they_reach(sharing, single):
    assert_exact_as_far_as_sweeps_reach(sharing, single)


@pytest.mark.nightly
@each_map(4, 12, cyclic=True)
def test_sweeps_equal_token_by_token_at_other_depths(sharing, single):
    assert_exact_as_far_as_sweeps_reach(sharing, single)


def assert_equals_naive(tiny: Tiny, sharing: SharingMap, single, recipe: Recipe, **where) -> None:
    """Mean loss and the gradient of every weight, by name."""
    model, weights = model_with(tiny, sharing, single)
    model.plan = solver_plan(sharing, recipe)
    tokens, labels = (random_tokens(tiny.vocabulary, 1, LENGTH, seed) for seed in (0, 1))
    naive = tiny.oracle(sharing, weights)
    loss, gradients = swept_loss_and_gradients(naive, tokens, labels, way_of(recipe), **where)
    got_loss, got = loss_and_gradients(
        model,
        single,
        tokens,
        labels,
        document_ids=where.get("documents"),
        position_ids=where.get("positions"),
    )
    assert abs(got_loss - loss) <= TOLERANCE * loss
    assert_close_by_name(got, gradients, TOLERANCE)


@pytest.mark.parametrize("recipe", TRAINED.values(), ids=TRAINED)
@each_map(8, cyclic=True)
def test_loss_and_gradients_equal_the_naive_model(sharing, recipe, single):
    assert_equals_naive(TINY, sharing, single, recipe)


DOCUMENTS = torch.tensor([[0] * 4 + [1] + [2] * 6])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize("name", ["two-sweep", "one-sweep", "strided-self"])
@one_of_each_pattern()
def test_packed_documents(sharing, name, single):
    where = {"documents": DOCUMENTS, "positions": POSITIONS}
    assert_equals_naive(TINY, sharing, single, TRAINED[name], **where)


VARIED_MAPS = {
    "sandwich-top": "0_6_6_6_6_6_6_7",
    "several-targets": "0_5_3_3_6_5_6_3",
    "windowed": "0s_4_4s_4_4s_0s_7s_7",
}


@pytest.mark.parametrize("kv_map", VARIED_MAPS.values(), ids=VARIED_MAPS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["two-sweep", "one-sweep", "strided-zero"])
def test_blocks_without_masks(name, kv_heads, kv_map, single, monkeypatch):
    """Long subsets read KV block by block with causal kernels; here short ones do too."""
    monkeypatch.setattr(context, "BLOCKWISE_FROM", 1)
    tiny = TINY.but(kv_heads=kv_heads)
    assert_equals_naive(tiny, SharingMap.parse(kv_map), single, TRAINED[name])


RECOMPUTE = {
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full"},
    "full-in-threes": {"recompute_granularity": "full", "recompute_num_layers": 3},
}


@pytest.mark.parametrize("policy", RECOMPUTE)
@pytest.mark.parametrize("blockwise", [False, True], ids=["masks", "blocks"])
@pytest.mark.parametrize(
    "name", ["two-sweep", pytest.param("one-sweep", marks=pytest.mark.nightly)]
)
@one_of_each_pattern()
def test_recompute_changes_nothing(sharing, name, blockwise, policy, single, monkeypatch):
    if blockwise:
        monkeypatch.setattr(context, "BLOCKWISE_FROM", 1)
    tokens, labels = (random_tokens(TINY.vocabulary, 2, LENGTH, seed) for seed in (0, 1))
    found = []
    for extra in ({}, RECOMPUTE[policy]):
        model, _ = model_with(TINY.but(extra=extra), sharing, single)
        model.plan = solver_plan(sharing, TRAINED[name])
        found.append(loss_and_gradients(model, single, tokens, labels))
    (loss, gradients), (again, recomputed) = found
    assert loss == again
    assert_close_by_name(recomputed, gradients, 1e-6)


@pytest.mark.parametrize("name", ["two-sweep", "one-sweep", "strided-self", "jacobi-input"])
@one_of_each_pattern()
def test_a_later_token_never_changes_an_earlier_logit(sharing, name, single):
    model, _ = model_with(TINY, sharing, single)
    plan = solver_plan(sharing, TRAINED[name])
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    before = logits_of(model, tokens, plan)
    for changed in (1, 6, LENGTH - 1):
        others = tokens.clone()
        others[:, changed:] = (others[:, changed:] + 7) % TINY.vocabulary
        after = logits_of(model, others, plan)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.equal(after[:, changed], before[:, changed])


@one_of_each_pattern()
def test_bf16_follows_fp32(sharing, single):
    """Rounding to bf16 moves loss and gradients by no more than it moves those of `paper`."""
    tokens, labels = (random_tokens(TINY.vocabulary, 2, LENGTH, seed) for seed in (0, 1))
    moved = {}
    for name in ("paper", "two-sweep"):
        found = []
        for bf16 in (False, True):
            model, _ = model_with(TINY.but(extra={"bf16": bf16}), sharing, single)
            model.plan = solver_plan(sharing, RECIPES[name])
            found.append(loss_and_gradients(model, single, tokens, labels))
        (loss, gradients), (rounded_loss, rounded) = found
        assert abs(rounded_loss - loss) <= 6e-3 * loss
        moved[name] = max(relative_differences(rounded, gradients).values())
    assert moved["two-sweep"] <= max(0.1, 2 * moved["paper"])


def test_sweeps_stop_once_nothing_moves(single):
    """At the least as many as the floor, at the most as many as the cap; what is left out is 0."""
    sharing = build_map(8, "sandwich-top", 3)
    model, _ = model_with(TINY, sharing, single)
    tokens = random_tokens(TINY.vocabulary, 2, LENGTH)

    def sweeps(residual: float, least: int, most: int) -> int:
        limits = Tolerance(residual=residual, least=least, most=most)
        plan = solver_plan(sharing, RECIPES["two-sweep"], limits)
        with torch.no_grad():
            rows = model(tokens, plan=plan, measure_residual=True).residuals
        return int((rows[0, :, 1] > 0).sum())

    assert sweeps(1e9, 1, 9) == 2
    assert sweeps(1e9, 3, 9) == 4
    assert sweeps(1e-30, 1, 2) == 3
    assert 2 < sweeps(1e-6, 1, 9) < 9


def test_the_suite_sees_a_reader_of_stale_keys(single):
    """Reading what the sweep before left, not what this one has refreshed, moves the loss."""
    sharing = build_map(8, "sandwich-top", 3)
    tokens, labels = (random_tokens(TINY.vocabulary, 1, LENGTH, seed) for seed in (0, 1))
    naive = TINY.oracle(sharing, TINY.weights(sharing))
    fresh, _ = swept_loss_and_gradients(naive, tokens, labels, Way(4, 1, 1))
    stale, _ = swept_loss_and_gradients(naive, tokens, labels, Way(1, 1, 1))
    assert abs(fresh - stale) > 1e-3


def test_the_suite_sees_a_projection_without_gradient(single):
    """Same loss, other gradients of the target's K and V weights."""
    sharing = build_map(8, "sandwich-top", 3)
    tokens, labels = (random_tokens(TINY.vocabulary, 1, LENGTH, seed) for seed in (0, 1))
    naive = TINY.oracle(sharing, TINY.weights(sharing))
    loss, plain = swept_loss_and_gradients(naive, tokens, labels, Way(4, 1, 1))
    same, projected = swept_loss_and_gradients(
        naive, tokens, labels, Way(4, 1, 1, project_at_use=True)
    )
    assert abs(loss - same) < 1e-12
    differences = relative_differences(plain, projected)
    assert differences["model.layers.6.self_attn.v_proj.weight"] > 1e-2
