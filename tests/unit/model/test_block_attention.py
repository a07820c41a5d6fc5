"""Attention of a token subset, block by block, against the explicit masks of the oracle."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.kernels.choice import causal_kernel
from megatron_kvshare.model.core_attention import attend
from megatron_kvshare.model.kv import KV, KVBlocks
from megatron_kvshare.model.visibility import Visibility
from tests import oracle
from tests.gpu_kernels import on_gpu_route
from tests.unit.model.test_core_attention import (
    BATCH,
    HEADS,
    LENGTH,
    WIDTH,
    LargestTensor,
    assert_same_with_gradients,
    random_inputs,
)

each_head = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
each_order = pytest.mark.parametrize("strict", [False, True], ids=["causal", "strict"])


def blocks_of(key: torch.Tensor, value: torch.Tensor, stride: int, known: int) -> KVBlocks:
    blocks = KVBlocks.of(KV(key, value), stride).blocks
    return KVBlocks((*blocks[:known], *[None] * (stride - known)))


def may_see(stride: int, offset: int, known: int, strict: bool) -> torch.Tensor:
    """[queries, keys]: of the keys in order, those in known blocks only."""
    is_known = torch.arange(LENGTH) % stride < known
    return oracle.visible([0] * LENGTH, strict, None)[offset::stride] & is_known


def naive(query, key, value, seen):
    rows = [oracle.attend(query[:, i], key[:, i], value[:, i], seen) for i in range(BATCH)]
    return torch.stack(rows, dim=1)


@each_head
@each_order
@pytest.mark.parametrize("stride", [1, 2, 3, 4, LENGTH])
def test_equals_explicit_masks(heads, strict, stride):
    for offset in range(stride):
        inputs = random_inputs(heads, len(range(offset, LENGTH, stride)))
        for known in range(1, stride + 1):
            source = blocks_of(*inputs[1:], stride, known)
            out = attend(inputs[0], source, Visibility(strict, offset=offset))
            expected = naive(*inputs, may_see(stride, offset, known, strict))
            assert_same_with_gradients(out, expected, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("known", [1, 2, 3])
@each_order
def test_query_that_sees_nothing_gives_exactly_zero_and_finite_gradients(
    strict, known, offset, dtype
):
    inputs = random_inputs((4, 2), len(range(offset, LENGTH, 3)), dtype)
    source = blocks_of(*inputs[1:], 3, known)
    out = attend(inputs[0], source, Visibility(strict, offset=offset))
    out.float().square().sum().backward()
    blind = ~may_see(3, offset, known, strict).any(1)
    assert blind.any() == (strict and offset == 0)  # token 0; block 0 is always known
    assert (out[blind] == 0).all()
    assert (inputs[0].grad[blind] == 0).all()
    assert (out[~blind] != 0).any(-1).all()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_nothing_known_gives_exactly_zero():
    query = random_inputs((4, 2), 5)[0]
    out = attend(query, KVBlocks.unknown(3), Visibility(True, offset=0))
    assert out.shape == (5, BATCH, 4 * WIDTH)
    assert (out == 0).all()
    out.sum().backward()
    assert (query.grad == 0).all()


@each_head
@each_order
def test_no_matrix_of_queries_and_keys(heads, strict):
    length, stride, offset = 2048, 4, 2
    query = torch.randn(length // stride, 1, heads[0], WIDTH, requires_grad=True)
    key, value = (torch.randn(length, 1, heads[1], WIDTH, requires_grad=True) for _ in range(2))
    with LargestTensor() as largest:
        source = KVBlocks.of(KV(key, value), stride)
        attend(query, source, Visibility(strict, offset=offset)).sum().backward()
    assert 0 < largest.elements < len(query) * length / 4


def test_what_has_a_kernel():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    everything = causal_kernel(cpu, torch.float32, 20)
    assert everything is not None and everything is causal_kernel(cpu, torch.bfloat16, 64)
    with on_gpu_route():
        assert causal_kernel(cuda, torch.bfloat16, 64) not in (None, everything)
        assert causal_kernel(cuda, torch.float32, 64) is None
        assert causal_kernel(cuda, torch.bfloat16, 20) is None
        assert causal_kernel(cuda, torch.bfloat16, 264) is None
