"""What the block reports and which layers it runs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_kvshare.model.layer import KVShareLayer
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import StepMode, jacobi_plan
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
    assert first.shape == (len(sharing.cyclic_groups), 2)
    # Before the first pass there is nothing: the change is all there is.
    assert torch.equal(first[:, 0], first[:, 1])
    assert (second[:, 0] < second[:, 1]).all() and (second[:, 0] > 0).all()
    assert (exact[:, 0] <= 1e-12 * exact[:, 1]).all()


def test_residual_of_a_map_without_groups_is_none(single):
    assert residuals(SharingMap.parse("0_0_2_2"), single, (1, 1)) is None


@pytest.mark.parametrize(
    "sharing",
    [*named_maps(8).values(), *random_maps(8, 4).values()],
    ids=[*named_maps(8), *random_maps(8, 4)],
)
def test_runs_exactly_the_steps_of_the_plan(sharing, single, monkeypatch):
    ran: Counter[tuple[str, int]] = Counter()
    model = TINY.model(sharing, single, (3, 2))
    load_by_name(model, TINY.weights(sharing))
    layers = {id(layer): index for index, layer in enumerate(model.decoder.layers)}

    def watch(method: str) -> None:
        plain = getattr(KVShareLayer, method)

        def run(self, *arguments):
            ran[method, layers[id(self)]] += 1
            return plain(self, *arguments)

        monkeypatch.setattr(KVShareLayer, method, run)

    for method in ("forward", "key_values", "feed_forward"):
        watch(method)
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    model(tokens)

    expected: Counter[tuple[str, int]] = Counter()
    for segment in jacobi_plan(sharing, 3, 2).segments:
        for sweep in segment.sweeps:
            for step in sweep.steps:
                if step.mode is StepMode.KV_ONLY:
                    expected["key_values", step.layer] += 1
                    continue
                expected["feed_forward", step.layer] += 1
                expected["forward", step.layer] += step.mode is StepMode.FULL
    assert +ran == +expected
