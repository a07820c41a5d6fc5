"""What is known of keys and values grows from view to view; no view changes."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.model.block import StageTensors
from megatron_kvshare.model.kv import KV, KVBlocks
from megatron_kvshare.model.kv_view import KVView
from megatron_kvshare.sharing.map import SharingMap
from tests.product import Tiny, load_by_name, random_tokens

TINY = Tiny()
LENGTH, STRIDE = 8, 4
UPWARD = SharingMap.parse("0_3_3_3")


@pytest.fixture
def contexts(single):
    """Of a model whose layers 1 and 2 read layer 3."""
    return TINY.model(UPWARD, single).contexts(random_tokens(TINY.vocabulary, 1, LENGTH))


def some_kv(tokens: int) -> KV:
    return KV(*torch.randn(2, tokens, 1, 2, 8).unbind())


def test_own_keys_and_values_are_in_the_next_view_only(contexts):
    context = contexts.visit(STRIDE, 1)
    before = KVView({3: KVBlocks.of(some_kv(LENGTH), STRIDE)}, context)
    own = some_kv(LENGTH // STRIDE)
    after = before.with_own(3, own)
    assert after.blocks(3).block(1) is own and before.blocks(3).block(1) is not own
    for other in (0, 2, 3):
        assert after.blocks(3).block(other) is before.blocks(3).block(other)
    assert after.blocks(0) == KVBlocks.unknown(STRIDE)


def test_what_is_arranged_follows_what_is_known(contexts):
    """Consumers share one arrangement until their producer makes something new."""
    context = contexts.visit(STRIDE, 1)
    view = KVView({3: KVBlocks.of(some_kv(LENGTH), STRIDE)}, context)
    first = view.readable(1)
    assert view.readable(2) is first
    assert view.with_own(0, some_kv(LENGTH // STRIDE)).readable(1) is first
    own = some_kv(LENGTH // STRIDE)
    renewed = view.with_own(3, own)
    assert torch.equal(renewed.readable(1).kv.key, renewed.blocks(3).concatenated().key)
    assert not torch.equal(renewed.readable(1).kv.key, first.kv.key)
    assert view.readable(1) is first


def test_a_view_without_a_producer_keeps_the_others(contexts):
    kv = {0: some_kv(LENGTH), 3: some_kv(LENGTH)}
    view = KVView.of_all_tokens(kv, contexts.whole).without(0)
    assert list(view.whole()) == [3]
    assert torch.equal(view.whole()[3].key, kv[3].key)


@pytest.mark.parametrize("kv_map", ["0_0_2_2", "0_3_3_3"])
def test_what_enters_a_block_is_not_touched(kv_map, single):
    sharing = SharingMap.parse(kv_map)
    model = TINY.model(sharing, single)
    load_by_name(model, TINY.weights(sharing))
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    entering = StageTensors(model.embedding(tokens), {})
    output = model.decoder(entering, model.contexts(tokens), model.plan)
    read_by_others = {p for p in range(4) if sharing.consumers_of(p)}
    above = {p for p in read_by_others if not sharing.cyclic_groups}
    assert entering.kv == {} and set(output.leaving.kv) == above
