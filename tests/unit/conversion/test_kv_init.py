"""Where the keys and values of a shared-KV model come from."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_kvshare.conversion.kv_init import KVInit, SharedKVWeights, best_order
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import TINY, InMemory, exported, model_spec
from tests.product import random_tokens

STANDARD = build_map(4, "standard")
SHARED = SharingMap((0, 2, 2, 2), (False,) * 4)
WIDE = TINY.but(heads=8, kv_heads=4)
HEADS, WIDTH = 4, 4


def attention(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{part}_proj.weight"


def shared(weights, init: str, map: SharingMap = SHARED) -> SharedKVWeights:
    return SharedKVWeights(
        InMemory(weights), model_spec(STANDARD, tiny=WIDE), map, KVInit(init), seed=1
    )


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return WIDE.weights(STANDARD)


def test_everything_else_is_copied(weights):
    for init in ("mean", "target", "random"):
        made = shared(weights, init)
        for name in made.tensors:
            if not name.endswith(("k_proj.weight", "v_proj.weight")):
                assert torch.equal(made.read(name), weights[name])
        assert attention(1, "k") not in made.tensors and attention(2, "k") in made.tensors


@pytest.mark.parametrize("part", "kv")
def test_mean_target_random(part, weights):
    name = attention(2, part)
    readers = [weights[attention(layer, part)] for layer in (2, 1, 3)]
    assert torch.allclose(shared(weights, "mean").read(name), sum(readers) / 3, atol=1e-7)
    assert torch.equal(shared(weights, "target").read(name), weights[name])
    drawn = shared(weights, "random").read(name)
    assert abs(float(drawn.std()) - 0.02) < 0.005
    assert torch.equal(drawn, shared(weights, "random").read(name))
    assert not torch.equal(drawn, shared(weights, "random").read(attention(2, "vk"[part == "v"])))
    untouched = shared(weights, "mean").read(attention(0, part))
    assert torch.equal(untouched, weights[attention(0, part)])


def turned(weights, layer: int, producer: int) -> dict[str, torch.Tensor]:
    """A model in which the layer's heads are placed and turned as ``aligned`` does."""
    made = shared(weights, "aligned")
    return {**weights, **{attention(layer, p): made._turned(layer, producer, p) for p in "qkvo"}}


def test_turning_a_layer_towards_a_producer_changes_nothing_it_computes(weights):
    tokens = random_tokens(WIDE.vocabulary, 2, 11, seed=0)
    before = exported(STANDARD, weights, tiny=WIDE)(tokens).logits
    changed = turned(weights, 1, 2)
    assert not torch.allclose(changed[attention(1, "k")], weights[attention(1, "k")], atol=1e-3)
    after = exported(STANDARD, changed, tiny=WIDE)(tokens).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def disguised(weights, layer: int, producer: int) -> dict[str, torch.Tensor]:
    """The layer gets the producer's keys and values: heads in another order, keys rotated in their
    rotary planes, values by an orthogonal matrix."""
    draw = torch.Generator().manual_seed(5)
    order = torch.tensor([2, 0, 3, 1])
    angles = torch.rand(HEADS, WIDTH // 2, generator=draw) * 6
    cos, sin = angles.cos()[..., None], angles.sin()[..., None]
    keys = weights[attention(producer, "k")].unflatten(0, (HEADS, WIDTH))[order]
    low, high = keys.chunk(2, dim=1)
    keys = torch.cat((cos * low - sin * high, sin * low + cos * high), dim=1)
    turn = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, generator=draw))[0]
    values = turn @ weights[attention(producer, "v")].unflatten(0, (HEADS, WIDTH))[order]
    new = {attention(layer, "k"): keys.flatten(0, 1), attention(layer, "v"): values.flatten(0, 1)}
    norm = "input_layernorm.weight"
    same = {f"model.layers.{layer}.{norm}": weights[f"model.layers.{producer}.{norm}"]}
    return {**weights, **new, **same}


@pytest.mark.parametrize("part", "kv")
def test_aligned_sees_through_a_disguise(part, weights):
    hidden = disguised(disguised(weights, 1, 2), 3, 2)
    wanted = weights[attention(2, part)]
    aligned = shared(hidden, "aligned").read(attention(2, part))
    assert torch.allclose(aligned, wanted, atol=1e-5)
    plain = shared(hidden, "mean").read(attention(2, part))
    assert (plain - wanted).norm() > 0.5 * wanted.norm()


def test_best_order_is_the_best():
    for seed in range(30):
        likeness = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
        totals = {
            order: sum(float(likeness[row, column]) for column, row in enumerate(order))
            for order in itertools.permutations(range(5))
        }
        assert totals[best_order(likeness)] == max(totals.values())
