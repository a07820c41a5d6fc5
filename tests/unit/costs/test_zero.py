"""Memory where DeepSpeed trains, against what DeepSpeed 0.19.8 was seen to hold."""

from __future__ import annotations

import pytest

from megatron_kvshare.costs.memory import TrainingLayout, kv_bytes, training_memory
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import parameters
from megatron_kvshare.costs.zero import Gathers, Zero, gathers, host_bytes, zero_memory
from megatron_kvshare.sharing import patterns
from megatron_kvshare.sharing.solver import RECIPES, jacobi_plan, solver_plan
from megatron_kvshare.tables.engines import engine_lines

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=128,
    seq_length=16,
)
MAP = patterns.build_map(4, "sandwich-top", 2, None)
PLAN = solver_plan(MAP, RECIPES["two-sweep"])
OWNED = parameters(SHAPE, MAP)


@pytest.mark.parametrize(
    ("stage", "bf16", "state", "buffers"),
    [
        # Bytes per parameter on each of two ranks, in live tensors after backward, of 16 linear
        # layers with buckets of two of them; None: freed again before they could be counted.
        (0, False, 16.0, 4.0),
        (1, False, 14.0, 0.5),
        (2, False, 12.0, 0.5),
        (3, False, 10.0, 0.5 + 4.0),
        (0, True, 16.0, None),
        (1, True, 14.0, None),
        (2, True, 10.0, 0.5),
        (3, True, 9.0, 0.5 + 2.0),
    ],
)
def test_the_estimate_is_what_deepspeed_holds(stage, bf16, state, buffers):
    layout = TrainingLayout(micro_batch_size=1, data_parallel_size=2, bf16=bf16)
    its = zero_memory(SHAPE, PLAN, layout, Zero(stage=stage, reduce_bucket=OWNED // 8))
    assert (its.weights + its.gradients + its.optimizer) / OWNED == pytest.approx(state, abs=1e-3)
    if buffers is not None:
        assert its.buffers / OWNED == pytest.approx(buffers, abs=1e-3)


def test_activations_are_those_of_the_model_under_every_engine():
    layout = TrainingLayout(micro_batch_size=2, data_parallel_size=4, recompute_full=True)
    theirs = training_memory(SHAPE, PLAN, layout)
    ours = zero_memory(SHAPE, PLAN, layout, Zero(stage=3))
    assert (ours.activations, ours.logits) == (theirs.activations, theirs.logits)
    # Two producers of 4 x 16 keys and values, fp32, two sequences of 16 tokens.
    assert kv_bytes(SHAPE, PLAN, layout) == 2 * (2 * 64) * 4 * 2 * 16 < ours.activations


def test_what_is_offloaded_lies_in_the_memory_of_the_host():
    layout = TrainingLayout(micro_batch_size=1, data_parallel_size=2, bf16=True)
    both = Zero(stage=3, offloads_optimizer=True, offloads_weights=True)
    its = zero_memory(SHAPE, PLAN, layout, both)
    assert its.weights == its.gradients == its.optimizer == 0
    assert host_bytes(SHAPE, PLAN, layout, both) / OWNED == pytest.approx(
        (2 + 12 + 4) / 2, abs=1e-3
    )


def test_a_layer_is_gathered_once_per_run():
    """Layers 1 to 3 of the paper's recipe: seven sweeps without gradient and two with."""
    (group,) = gathers(SHAPE, solver_plan(MAP, RECIPES["paper"]), tensor_ranks=1)
    assert (MAP.notation, group.first, group.last) == ("0_3_3_3", 1, 3)
    # Queries and outputs of three layers, keys and values of the top one, MLPs and norms.
    elements = (3 * 2 + 2) * 64 * 64 + 3 * (3 * 64 * 128 + 2 * 64)
    assert (group.forward, group.backward) == (9, 2)
    assert group.elements == elements
    halves = gathers(SHAPE, PLAN, tensor_ranks=2)
    assert halves[0].elements == elements // 2


def test_acyclic_maps_gather_as_usual():
    assert gathers(SHAPE, jacobi_plan(patterns.build_map(4, "cla:2", None, None)), 1) == ()


def test_the_table_has_both_engines_and_marks_the_run():
    layout = TrainingLayout(micro_batch_size=1, data_parallel_size=2)
    lines = engine_lines(SHAPE, PLAN, layout, Zero(stage=2))
    assert "2 data-parallel replicas" in lines[0]
    names = [line.split("  ")[0] for line in lines[2:8]]
    assert names == [
        "megatron",
        "megatron, distributed optimizer",
        "deepspeed, ZeRO 0",
        "deepspeed, ZeRO 1",
        "deepspeed, ZeRO 2 *",
        "deepspeed, ZeRO 3",
    ]
    (group,) = gathers(SHAPE, PLAN, 1)
    assert isinstance(group, Gathers)
    assert f"stage3_max_reuse_distance {group.elements}" in lines[-1]
    assert f"stage3_max_live_parameters {group.elements + 50_000_000}" in lines[-1]
