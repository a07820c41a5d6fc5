"""Interleaved token subsets: what a split holds, and that joining undoes it."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.model.kv import join_tokens, split_tokens
from megatron_kvshare.sharing.plan import subset_length

SIZES = [(12, 1), (12, 4), (13, 4), (11, 4), (5, 5), (3, 5), (1, 2)]
each_size = pytest.mark.parametrize(("length", "stride"), SIZES)


def numbered(length: int) -> torch.Tensor:
    return torch.randn(length, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()


@each_size
def test_a_part_holds_every_stride_th_token(length, stride):
    x = numbered(length)
    parts = split_tokens(x, stride)
    assert len(parts) == stride
    for offset, part in enumerate(parts):
        assert torch.equal(part, x[offset::stride])
        assert part.shape[0] == subset_length(length, stride, offset)


@each_size
def test_gradient_of_a_split(length, stride):
    x = numbered(length)
    # A part of its own weight: tokens must get the gradient of the subset they went to.
    sum((1 + offset) * part.sum() for offset, part in enumerate(split_tokens(x, stride))).backward()
    expected = 1 + torch.arange(length) % stride
    assert torch.equal(x.grad, expected[:, None, None].expand_as(x).float())


@each_size
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_joining_undoes_a_split_along_any_dimension(length, stride, dim):
    x = numbered(length)
    parts = [part.transpose(0, dim) for part in split_tokens(x, stride)]
    joined = join_tokens(parts, dim)
    assert torch.equal(joined, x.transpose(0, dim))
    weights = torch.randn(joined.shape, generator=torch.Generator().manual_seed(1))
    (joined * weights).sum().backward()
    assert torch.equal(x.grad, weights.transpose(0, dim))
