"""Payloads hold what is put in, wherever the rows of a rank lie, and give gradients back."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.model.block import StageTensors
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV
from megatron_kvshare.pipeline.payload import PayloadFormat, own_part, spread_part

LENGTH, BATCH, HIDDEN, WIDTH = 8, 3, 10, 4


def tensors(heads: HeadLayout, sequence_ranks: int) -> StageTensors:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    kv_shape = (LENGTH, BATCH, heads.local_kv_heads, WIDTH)
    kv = {layer: KV(draw(*kv_shape), draw(*kv_shape)) for layer in (1, 5)}
    return StageTensors(draw(LENGTH // sequence_ranks, BATCH, HIDDEN), kv)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("sequence_ranks", [1, 2, 4])
def test_round_trip_and_gradients(sequence_ranks: int, padding: int) -> None:
    heads = HeadLayout(8, 8, WIDTH, 0, sequence_ranks)
    sent = tensors(heads, sequence_ranks)
    width = HIDDEN + 2 * 2 * heads.local_kv_heads * WIDTH * sequence_ranks + padding
    shape = (LENGTH // sequence_ranks, BATCH, width)
    payload = PayloadFormat(HIDDEN, (1, 5), shape, heads, sequence_ranks)
    packed = payload.pack(sent)
    assert packed.shape == shape
    assert not packed[..., width - padding :].any()
    received = payload.unpack(packed)
    pairs = [(sent.hidden, received.hidden)]
    pairs += [pair for p in (1, 5) for pair in zip(sent.kv[p], received.kv[p], strict=True)]
    for before, after in pairs:
        assert torch.equal(before, after)
        weights = torch.randn_like(after)
        (gradient,) = torch.autograd.grad((after * weights).sum(), before, retain_graph=True)
        assert torch.equal(gradient, weights)


def test_a_missing_producer_is_an_error() -> None:
    heads = HeadLayout(2, 2, WIDTH, 0, 1)
    payload = PayloadFormat(HIDDEN, (1, 3), (LENGTH, BATCH, 42), heads, 1)
    with pytest.raises(KeyError):
        payload.pack(tensors(heads, 1))


def test_ranks_that_share_a_head_send_its_columns_once() -> None:
    """Four ranks, two heads: two ranks for each, which together send a head."""
    head = torch.randn(LENGTH, BATCH, 1, WIDTH)
    parts = []
    for rank in (2, 3):
        heads = HeadLayout(4, 2, WIDTH, rank, 4)
        part = own_part(head, heads)
        assert part.shape == (LENGTH, BATCH, WIDTH // 2)
        parts.append(spread_part(part, heads))
    assert torch.equal(parts[0] + parts[1], head)
