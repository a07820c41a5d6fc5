"""Costs: the published factors, counts done by hand, and what must hold for every map."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.costs import cost
from megatron_kvshare.costs.memory import TrainingLayout, training_memory
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import parameters
from megatron_kvshare.costs.work import step_flops, visible_pairs
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.plan import LayerStep, StepMode
from megatron_kvshare.sharing.solver import RECIPES, jacobi_plan, solver_plan
from tests.unit.sharing.strategies import NINE, sharing_maps

TINY_LLAMA = ModelShape(
    num_layers=22,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=32,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=32000,
    seq_length=2048,
    tied_embeddings=False,
)
SMALL = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=20,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=30,
    seq_length=6,
)
passes = st.tuples(st.integers(0, 4), st.integers(1, 3))


def shape_of(sharing: SharingMap) -> ModelShape:
    return dataclasses.replace(SMALL, num_layers=sharing.num_layers)


@pytest.mark.parametrize(
    ("pattern", "kv_layers", "train", "prefill"),
    [
        ("sandwich-top", 11, 2.82, 118 / 22),
        ("sandwich-top", 3, 4.03, 182 / 22),
        ("sandwich-middle", 11, 1.91, 70 / 22),
        ("sandwich-middle", 3, 2.52, 102 / 22),
        ("sandwich-bottom", 11, 1.0, 1.0),
        ("pizza-bottom", 3, 1.0, 1.0),
        ("lasagna-bottom", 11, 1.0, 1.0),
    ],
)
def test_published_factors(pattern: str, kv_layers: int, train: float, prefill: float) -> None:
    plan = jacobi_plan(build_map(22, pattern, kv_layers))
    assert cost.train_factor(plan) == pytest.approx(train, abs=0.005)
    assert cost.prefill_factor(plan) == pytest.approx(prefill)


@given(sharing_maps(), passes, st.booleans())
def test_factors_follow_the_formulas(
    sharing: SharingMap, counts: tuple[int, int], skip: bool
) -> None:
    layers, (m, b) = sharing.num_layers, counts
    inside = sum(last - first + 1 for first, last in sharing.cyclic_groups)
    plan = jacobi_plan(sharing, m, b, skip=skip)
    train = (3 * (layers - inside) + inside * (m + 3 * b)) / (3 * layers)
    assert cost.train_factor(plan) == pytest.approx(train)
    prefill = ((layers - inside) + inside * (m + b)) / layers
    assert cost.prefill_factor(plan) == pytest.approx(prefill)


def test_parameters_of_a_known_model() -> None:
    """TinyLlama 1.1B, as published: 1,100,048,384 weights."""
    assert parameters(TINY_LLAMA, build_map(22)) == 1_100_048_384
    halved = parameters(TINY_LLAMA, build_map(22, "cla:2"))
    assert 1_100_048_384 - halved == 11 * 2 * 2048 * 256
    tied = dataclasses.replace(TINY_LLAMA, tied_embeddings=True)
    assert parameters(tied, build_map(22)) == 1_100_048_384 - 32000 * 2048


def test_kv_bytes() -> None:
    assert cost.kv_bytes_per_token(TINY_LLAMA, build_map(22)) == 22 * 2 * 256 * 2
    assert cost.kv_bytes_per_token(TINY_LLAMA, build_map(22, "pizza-top", 3)) == 3 * 2 * 256 * 2
    assert cost.kv_bytes_per_token(TINY_LLAMA, build_map(22), bytes_per_element=4) == 45056


def test_step_flops_by_hand() -> None:
    sharing = SharingMap.parse("1_1")
    mlp, queries_and_output, keys_and_values = 3 * 8 * 20, 2 * 8 * 8, 2 * 8 * 4
    upward, ordinary = 2 * 8 * 15 / 6, 2 * 8 * 21 / 6  # scores and values: 8 wide, 15 or 21 pairs

    def flops(layer: int, mode: StepMode) -> float:
        pairs = visible_pairs(SMALL, sharing, layer)
        return step_flops(SMALL, sharing, LayerStep(layer, mode), 6, pairs) / 6

    assert flops(0, StepMode.FULL) == 2 * (mlp + queries_and_output + upward)
    full = 2 * (mlp + queries_and_output + keys_and_values + ordinary)
    assert flops(1, StepMode.FULL) == full
    assert flops(0, StepMode.NO_ATTENTION) == 2 * mlp
    assert flops(1, StepMode.KV_ONLY) == 2 * keys_and_values
    # m = 1, b = 1: a sweep without gradient that skips, a whole one with backward, and the head.
    plan = jacobi_plan(sharing, 1, 1)
    expected = 2 * mlp + 2 * keys_and_values + 3 * (flops(0, StepMode.FULL) + full) + 3 * 2 * 240
    assert cost.train_flops_per_token(SMALL, plan) == pytest.approx(expected)
    once = 2 * mlp + 2 * keys_and_values + flops(0, StepMode.FULL) + full
    assert cost.prefill_flops(SMALL, plan) == pytest.approx(6 * once + 480)


@given(
    st.integers(1, 12),
    st.none() | st.integers(1, 15),
    st.sampled_from(["0_0", "1_1", "0s_0s", "1s_1s"]),
)
def test_visible_tokens_are_counted_exactly(length: int, window: int | None, notation: str) -> None:
    sharing = SharingMap.parse(notation)
    shape = dataclasses.replace(SMALL, seq_length=length, window_size=window)
    for layer in range(2):
        reach = window if sharing.windowed[layer] and window is not None else length
        seen = sum(
            key > query - reach and key <= query - sharing.is_upward(layer)
            for query in range(length)
            for key in range(length)
        )
        assert visible_pairs(shape, sharing, layer) == seen


@given(sharing_maps(), passes)
def test_skipping_never_costs_more(sharing: SharingMap, counts: tuple[int, int]) -> None:
    shape = shape_of(sharing)
    skipping, whole = (jacobi_plan(sharing, *counts, skip=skip) for skip in (True, False))
    for measure in (cost.train_flops_per_token, cost.prefill_flops):
        assert measure(shape, skipping) <= measure(shape, whole)
    if sharing.is_cyclic:
        assert cost.train_flops_per_token(shape, skipping) < cost.train_flops_per_token(
            shape, whole
        )


@given(sharing_maps(), st.integers(0, 3))
def test_acyclic_maps_never_cost_more_than_standard(sharing: SharingMap, m: int) -> None:
    found = cost.costs(shape_of(sharing), jacobi_plan(sharing, m))
    assert found.kv_reduction == sharing.num_layers / len(sharing.producers)
    if not sharing.is_cyclic:
        assert found.train_factor == found.prefill_factor == 1.0
        assert found.train_flops_ratio <= 1.0
        assert found.prefill_flops_ratio <= 1.0


def test_the_standard_map_is_its_own_baseline() -> None:
    found = cost.costs(TINY_LLAMA, jacobi_plan(build_map(22)))
    assert found.train_flops_ratio == found.prefill_flops_ratio == found.kv_reduction == 1.0
    # 6 FLOPs per weight outside the embedding, and 6 per weight pair of the visible tokens.
    weights = 1_100_048_384 - 32000 * 2048 - 45 * 2048
    expected = 6 * weights + 22 * 3 * 4 * 2048 * 2049 / 2
    assert found.train_flops_per_token == pytest.approx(expected)


@pytest.mark.parametrize("pattern", NINE)
def test_flops_ratio_stays_below_the_unskipped_factor(pattern: str) -> None:
    for kv_layers in (6, 3):
        plan = jacobi_plan(build_map(12, pattern, kv_layers))
        shape = dataclasses.replace(TINY_LLAMA, num_layers=12)
        assert cost.costs(shape, plan).train_flops_ratio <= cost.train_factor(plan)


def test_lasagna_pairs_save_most_by_skipping() -> None:
    shape = dataclasses.replace(TINY_LLAMA, num_layers=12)
    plan = jacobi_plan(build_map(12, "lasagna-top", 6))
    assert cost.costs(shape, plan).train_flops_ratio < 0.70 * cost.train_factor(plan)


# ---- memory of training ----


def test_training_memory_of_a_known_model() -> None:
    plan = jacobi_plan(build_map(22))
    weights = 1_100_048_384
    fp32 = training_memory(TINY_LLAMA, plan, TrainingLayout(micro_batch_size=1))
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    bf16 = training_memory(TINY_LLAMA, plan, TrainingLayout(micro_batch_size=1, bf16=True))
    assert bf16.weights + bf16.gradients + bf16.optimizer == 18 * weights
    assert bf16.total == sum(dataclasses.astuple(bf16))


def test_training_memory_shrinks_with_the_layout() -> None:
    plan = jacobi_plan(build_map(22, "sandwich-top", 11))

    def memory(**layout: int) -> int:
        return training_memory(TINY_LLAMA, plan, TrainingLayout(micro_batch_size=2, **layout)).total

    whole = memory()
    assert memory(tensor_model_parallel_size=2) < whole
    assert memory(tensor_model_parallel_size=2, sequence_parallel=True) < memory(
        tensor_model_parallel_size=2
    )
    assert memory(data_parallel_size=4) == whole
    assert memory(data_parallel_size=4, use_distributed_optimizer=True) < whole
    assert memory(recompute_full=True) < whole


def test_only_gradient_passes_keep_activations() -> None:
    sharing = build_map(22, "sandwich-top", 3)
    layout = TrainingLayout(micro_batch_size=1)

    def kept(m: int, b: int) -> int:
        return training_memory(TINY_LLAMA, jacobi_plan(sharing, m, b), layout).activations

    assert kept(7, 2) == kept(1, 2)
    assert kept(7, 1) < kept(7, 2) < kept(7, 3)


def test_strided_passes_keep_as_much_as_parallel_ones() -> None:
    """The top layer's input is kept twice: for its keys and values, and for the rest of it."""
    sharing = build_map(22, "sandwich-top", 3)
    layout = TrainingLayout(micro_batch_size=1)
    two_sweep = training_memory(TINY_LLAMA, solver_plan(sharing, RECIPES["two-sweep"]), layout)
    parallel = training_memory(TINY_LLAMA, jacobi_plan(sharing, 1, 1), layout)
    assert two_sweep.activations - parallel.activations == 2048 * 2048 * 4
    assert two_sweep.weights == parallel.weights
