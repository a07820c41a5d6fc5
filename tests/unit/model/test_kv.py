"""Keys and values of interleaved token subsets, and how far a sweep has moved them."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.model.kv import KV, KVBlocks, relative_change, residual

LENGTH = 7


def random_kv(seed: int = 0, length: int = LENGTH) -> KV:
    generator = torch.Generator().manual_seed(seed)
    return KV(*torch.randn(2, length, 2, 3, 4, generator=generator).unbind())


def same(one: KV, other: KV) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def part(kv: KV, offset: int, stride: int) -> KV:
    return KV(kv.key[offset::stride], kv.value[offset::stride])


@pytest.mark.parametrize("stride", [1, 2, 3, LENGTH, LENGTH + 2])
def test_blocks_hold_every_stride_th_token_and_become_whole_again(stride):
    kv = random_kv()
    blocks = KVBlocks.of(kv, stride)
    assert blocks.stride == stride == len(blocks.known)
    assert all(same(block, part(kv, j, stride)) for j, block in enumerate(blocks.blocks))
    assert same(blocks.whole(), kv)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_concatenated_is_the_known_blocks_one_after_another(known):
    kv = random_kv()
    blocks = KVBlocks((*KVBlocks.of(kv, 3).blocks[:known], *[None] * (3 - known)))
    order = torch.cat([torch.arange(j, LENGTH, 3) for j in range(known)])
    assert len(blocks.known) == known
    assert same(blocks.concatenated(), KV(kv.key[order], kv.value[order]))


def test_blocks_become_known_one_by_one():
    kv = random_kv()
    blocks = KVBlocks.unknown(3)
    assert (blocks.stride, blocks.known) == (3, ())
    for offset in range(3):
        with pytest.raises(AssertionError, match="missing"):
            blocks.whole()
        blocks = blocks.with_block(offset, part(kv, offset, 3))
        assert len(blocks.known) == offset + 1
    assert same(blocks.whole(), kv)


def test_a_renewed_block_replaces_the_old_one_only():
    old, new = random_kv(0), random_kv(1)
    before = KVBlocks.of(old, 3)
    after = before.with_block(1, part(new, 1, 3))
    assert [after.blocks[j] is before.blocks[j] for j in range(3)] == [True, False, True]
    assert same(after.whole(), KV(*(_mixed(x, y) for x, y in zip(old, new, strict=True))))
    assert same(before.whole(), old)


def _mixed(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    renewed = (torch.arange(LENGTH) % 3 == 1)[:, None, None, None]
    return torch.where(renewed, new, old)


def test_another_stride_holds_the_same_tokens():
    kv = random_kv()
    blocks = KVBlocks.of(kv, 3)
    assert blocks.with_stride(3) is blocks
    for stride in (1, 2, 5):
        other = blocks.with_stride(stride)
        assert other.stride == stride
        assert all(same(block, part(kv, j, stride)) for j, block in enumerate(other.blocks))


@pytest.mark.parametrize(("stride", "stride_before"), [(1, 1), (3, 3), (3, 1)])
def test_residual_is_the_change_of_all_targets(stride, stride_before):
    new, old = {2: random_kv(0), 5: random_kv(1)}, {2: random_kv(2), 5: random_kv(3)}
    row = residual(
        {layer: KVBlocks.of(kv, stride) for layer, kv in new.items()},
        {layer: KVBlocks.of(kv, stride_before) for layer, kv in old.items()},
        (2, 5),
    )
    pairs = [(x, y) for layer in new for x, y in zip(new[layer], old[layer], strict=True)]
    change = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    total = sum(float(x.double().square().sum()) for x, _ in pairs)
    assert row.tolist() == pytest.approx([change, total])
    assert relative_change(row) == pytest.approx((change / total) ** 0.5)


def test_residual_of_what_was_not_there_is_all_of_it():
    new = {1: KVBlocks.of(random_kv(), 2), 4: KVBlocks.of(random_kv(1), 2)}
    change, total = residual(new, {}, (1,)).tolist()
    assert change == total == pytest.approx(sum(float(x.square().sum()) for x in random_kv()))
    assert relative_change(torch.zeros(2)) == 0.0
