"""Loss and every gradient after (m, b) passes against autograd through the naive model."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from tests import oracle
from tests.maps import NINE
from tests.parity.cases import each_map, one_of_each_pattern
from tests.product import (
    Tiny,
    assert_close_by_name,
    load_by_name,
    loss_and_gradients,
    random_tokens,
    relative_differences,
)

TINY = Tiny()
LENGTH = 9
PASSES = ((7, 2), (1, 2), (2, 1), (0, 1), (0, 2))
TOLERANCE = 1e-5


def assert_equals_oracle(
    tiny: Tiny, sharing: SharingMap, single, passes, documents=None, positions=None
) -> None:
    """Mean loss and the gradient of every weight, by name."""
    weights = tiny.weights(sharing)
    tokens, labels = (random_tokens(tiny.vocabulary, 1, LENGTH, seed) for seed in (0, 1))
    loss, gradients = oracle.loss_and_gradients(
        tiny.oracle(sharing, weights),
        tokens,
        labels,
        passes,
        documents=documents,
        positions=positions,
    )
    model = tiny.model(sharing, single, passes)
    load_by_name(model, weights)
    got_loss, got = loss_and_gradients(
        model, single, tokens, labels, document_ids=documents, position_ids=positions
    )
    assert abs(got_loss - loss) <= TOLERANCE * loss
    assert_close_by_name(got, gradients, TOLERANCE)


@each_map()
def test_equal_the_naive_model(sharing, single):
    for passes in PASSES if sharing.is_cyclic else ((7, 2),):
        assert_equals_oracle(TINY, sharing, single, passes)


@one_of_each_pattern()
def test_packed_documents(sharing, single):
    documents = torch.tensor([[0] * 3 + [1] + [2] * 5])
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
    assert_equals_oracle(TINY, sharing, single, (1, 2), documents, positions)


def but(**extra) -> dict:
    return {"extra": extra}


VARIANTS = {
    "untied": {"untied": True},
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "wide-heads": but(kv_channels=12),
    "window-1": {"window": 1},
    "window-2": {"window": 2},
    "window-beyond-sequence": {"window": 50},
    "rope-base": but(rotary_base=500000.0),
    "rope-scaling": but(use_rope_scaling=True, rope_original_max_positions=16),
    "padded-vocabulary": {"vocabulary": 33, **but(make_vocab_size_divisible_by=64)},
}
VARIED_MAPS = {
    "sandwich-top": "0_6_6_6_6_6_6_7",
    "lasagna-middle": "1_1_1_4_4_4_7_7",
    "several-targets": "0_5_3_3_6_5_6_3",
    "windowed": "0s_4_4s_4_4s_0s_7s_7",
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv_map", VARIED_MAPS.values(), ids=VARIED_MAPS)
def test_shapes_of_the_model(variant, kv_map, single):
    tiny = TINY.but(**VARIANTS[variant])
    assert_equals_oracle(tiny, build_map(8, kv_map=kv_map), single, (1, 2))


@pytest.mark.parametrize("pattern", NINE)
def test_the_suite_sees_a_gradient_cut_one_pass_early(pattern):
    """One pass fewer under gradient: same loss, other gradients where a map has upward layers."""
    sharing = build_map(8, pattern, 3)
    naive = TINY.oracle(sharing, TINY.weights(sharing))
    tokens, labels = (random_tokens(TINY.vocabulary, 1, LENGTH, seed) for seed in (0, 1))
    loss, once = oracle.loss_and_gradients(naive, tokens, labels, (2, 1))
    same_loss, twice = oracle.loss_and_gradients(naive, tokens, labels, (1, 2))
    assert loss == same_loss
    differences = relative_differences(once, twice)
    assert (max(differences.values()) > 1e-2) == sharing.is_cyclic
