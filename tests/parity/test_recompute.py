"""Recompute changes memory, never a number, and never repeats passes without gradient."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.sharing.patterns import build_map
from tests.maps import NINE, random_map
from tests.product import (
    Tiny,
    assert_close_by_name,
    load_by_name,
    loss_and_gradients,
    random_tokens,
)

TINY = Tiny()
TOLERANCE = 1e-6
POLICIES = {
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full"},
    "full-in-threes": {"recompute_granularity": "full", "recompute_num_layers": 3},
    "full-block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 5,
    },
}
MAPS = {pattern: build_map(8, pattern, 3) for pattern in NINE} | {
    "yoco": build_map(8, "yoco"),
    **{f"random.{seed}": random_map(seed, 8) for seed in range(3)},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sharing", MAPS.values(), ids=MAPS)
def test_recompute_gives_the_same_gradients(sharing, policy, single):
    tokens, labels = (random_tokens(TINY.vocabulary, 2, 12, seed) for seed in (0, 1))
    documents = torch.tensor([[0] * 12, [1] * 5 + [2] * 7])
    results = []
    for extra in ({}, POLICIES[policy]):
        model = TINY.but(extra=extra).model(sharing, single, (2, 2))
        load_by_name(model, TINY.weights(sharing))
        results.append(loss_and_gradients(model, single, tokens, labels, document_ids=documents))
    (loss, gradients), (recomputed_loss, recomputed) = results
    assert recomputed_loss == loss
    assert_close_by_name(recomputed, gradients, TOLERANCE)


def test_recompute_repeats_only_passes_with_gradient(single, monkeypatch):
    """Seven passes without gradient and two with: work is repeated twice, not nine times."""
    sharing = build_map(8, "sandwich-top", 3)
    forwards: Counter[str] = Counter()

    def counted(method):
        plain = getattr(KVShareLayer, method)

        def run(self, *arguments):
            forwards[stage] += 1
            return plain(self, *arguments)

        return run

    for method in ("forward", "key_values"):
        monkeypatch.setattr(KVShareLayer, method, counted(method))
    model = TINY.but(extra=POLICIES["full"]).model(sharing, single, (7, 2))
    load_by_name(model, TINY.weights(sharing))
    tokens = random_tokens(TINY.vocabulary, 1, 12)
    stage = "forward"
    loss = model(tokens, tokens).loss / tokens.numel()
    stage = "backward"
    loss.backward()
    # Group 1..6: its five upward layers and its top in both gradient passes; layers 0 and 7 once
    # each.
    assert forwards["backward"] == 2 * 6 + 2
