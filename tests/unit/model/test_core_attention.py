"""Attention over shared keys and values against the explicit masks of the oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_kvshare.model.core_attention import attend
from megatron_kvshare.model.kv import KV
from megatron_kvshare.model.visibility import SequenceLayout
from tests import oracle

LENGTH, BATCH, WIDTH = 13, 2, 8
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 7, [3] * 13])
CPU = torch.device("cpu")
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


def random_inputs(heads: tuple[int, int], queries: int, dtype: torch.dtype = torch.float32):
    """Queries [q, b, n, d], keys and values [s, b, g, d], all with gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (queries, BATCH, heads[0], WIDTH),
        (LENGTH, BATCH, heads[1], WIDTH),
        (LENGTH, BATCH, heads[1], WIDTH),
    ]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


def naive(query, key, value, documents, positions, strict, window):
    """The same [q, b, n * d] from the oracle, one sequence at a time."""
    rows = []
    for row in range(BATCH):
        of_row = [0] * LENGTH if documents is None else documents[row].tolist()
        may_see = oracle.visible(of_row, strict, window)[positions]
        rows.append(oracle.attend(query[:, row], key[:, row], value[:, row], may_see))
    return torch.stack(rows, dim=1)


def assert_same_with_gradients(out, expected, inputs):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for got, wanted in zip((out, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


SUBSETS = {
    "all": None,
    "strided": torch.arange(1, LENGTH, 3),
    "first": torch.tensor([0]),
    "last": torch.tensor([LENGTH - 1]),
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("strict", [False, True], ids=["causal", "strict"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_equals_explicit_masks(heads, strict, subset):
    for window, documents in itertools.product((None, 1, 2, 5, LENGTH, 99), (None, DOCUMENTS)):
        positions = SUBSETS[subset]
        layout = SequenceLayout(LENGTH, CPU, torch.float32, documents, positions)
        chosen = torch.arange(LENGTH) if positions is None else positions
        inputs = random_inputs(heads, len(chosen))
        out = attend(inputs[0], KV(*inputs[1:]), layout.visibility(strict, window))
        expected = naive(*inputs, documents, chosen, strict, window)
        assert_same_with_gradients(out, expected, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_query_that_sees_nothing_gives_exactly_zero_and_finite_gradients(dtype, documents, window):
    layout = SequenceLayout(LENGTH, CPU, dtype, documents)
    query, key, value = random_inputs((4, 2), LENGTH, dtype)
    out = attend(query, KV(key, value), layout.visibility(True, window))
    out.float().square().sum().backward()
    for row in range(BATCH):
        of_row = [0] * LENGTH if documents is None else documents[row].tolist()
        blind = ~oracle.visible(of_row, True, window).any(1)
        assert blind[0]
        assert (out[blind, row] == 0).all()
        assert (query.grad[blind, row] == 0).all()
        assert (out[~blind, row] != 0).any(-1).all()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


@pytest.mark.parametrize("strict", [False, True])
def test_sequence_of_one_token(strict):
    query = torch.randn(1, BATCH, 4, WIDTH, requires_grad=True)
    key, value = torch.randn(2, 1, BATCH, 2, WIDTH, requires_grad=True)
    out = attend(query, KV(key, value), SequenceLayout(1, CPU).visibility(strict, None))
    expected = torch.zeros_like(out) if strict else value.repeat_interleave(2, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert query.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("strict", [False, True], ids=["causal", "strict"])
def test_no_square_matrix_where_only_order_restricts(heads, strict):
    length = 1024
    query = torch.randn(length, 1, heads[0], WIDTH, requires_grad=True)
    key, value = (torch.randn(length, 1, heads[1], WIDTH, requires_grad=True) for _ in range(2))
    with LargestTensor() as largest:
        visible = SequenceLayout(length, CPU).visibility(strict, length)
        attend(query, KV(key, value), visible).sum().backward()
    assert 0 < largest.elements < length * length / 4
