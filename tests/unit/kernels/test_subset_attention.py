"""One kernel for a token subset: its mask against the rule, its values against the blockwise route.

FlexAttention has no backward on a CPU. There its forward runs as plain torch (`-m nightly`:
compiled by inductor's CPU backend, which says nothing of Triton's kernels), and gradients are those
of the mask written out (`tests/parity/test_gpu_route.py`). `-m gpu` runs the kernels themselves.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from megatron_kvshare.errors import ConfigError
from megatron_kvshare.kernels import choice, compiling, subset_attention
from megatron_kvshare.kernels.subset_attention import attend_subset, subset_mask
from megatron_kvshare.model.block_attention import attend_blocks
from megatron_kvshare.model.kv_view import KVView
from megatron_kvshare.sharing.map import SharingMap
from tests.gpu_kernels import on_one_kernel_route
from tests.product import Tiny, random_tokens
from tests.unit.model.test_kv_view import some_kv

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
each_order = pytest.mark.parametrize("strict", [False, True], ids=["causal", "strict"])


def positions(length: int, stride: int, known: int) -> Tensor:
    """Tokens in group order."""
    return torch.tensor([t for subset in range(known) for t in range(subset, length, stride)])


def rule(length: int, stride: int, offset: int, strict: bool, known: int) -> Tensor:
    """Key u is seen by query t if u < t, or u <= t."""
    queries, keys = torch.arange(offset, length, stride), positions(length, stride, known)
    return (keys < queries[:, None]) if strict else (keys <= queries[:, None])


BY_DEFAULT = {(129, 1), (129, 2), (129, 3), (6, 5), (515, 4)}
SIZES = [
    pytest.param(*size, marks=() if size in BY_DEFAULT else pytest.mark.nightly)
    for size in itertools.product((6, 127, 128, 129, 512, 515, 1280), (1, 2, 3, 4, 5))
]


@each_order
@pytest.mark.parametrize(("length", "stride"), SIZES)
def test_masks(length: int, stride: int, strict: bool):
    """Each element, and what torch makes of them block by block."""
    for offset in range(stride):
        for known in range(1, stride + 1):
            mask = subset_mask(length, stride, offset, strict, known, CPU)
            wanted = rule(length, stride, offset, strict, known)
            q, k = wanted.shape
            assert torch.equal(flex.create_mask(mask.mask_mod, 1, 1, q, k, CPU)[0, 0], wanted)
            of_torch = flex.create_block_mask(mask.mask_mod, 1, 1, q, k, CPU)
            assert mask.seq_lengths == of_torch.seq_lengths and mask.shape == of_torch.shape
            for name in ("kv", "full_kv", "q", "full_q"):
                assert listed(mask, name) == listed(of_torch, name), (offset, known, name)


def listed(mask: flex.BlockMask, name: str) -> list[set[int]]:
    """The blocks of each row, of those that are listed."""
    counts, blocks = (getattr(mask, f"{name}_{what}") for what in ("num_blocks", "indices"))
    rows = zip(counts.flatten().tolist(), blocks.flatten(0, -2).tolist(), strict=True)
    return [set(row[:count]) for count, row in rows]


def heads(tokens: int, count: int, seed: int, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, tokens, width, generator=generator)


def by_one_kernel(length: int, stride: int, offset: int, strict: bool, known: int) -> None:
    """Values are those of the blockwise route; a query that sees nothing gives exactly 0."""
    query = heads(len(range(offset, length, stride)), 4, 1)
    key, value = heads(length, 2, 2), heads(length, 2, 3)
    order = positions(length, stride, known)
    mask = subset_mask(length, stride, offset, strict, known, CPU)
    found = attend_subset(query, key[:, :, order], value[:, :, order], mask)
    blocks = [tuple(x[:, :, j::stride] for j in range(known)) for x in (key, value)]
    torch.testing.assert_close(found, attend_blocks(query, *blocks, offset, strict))
    blind = ~rule(length, stride, offset, strict, known).any(-1)
    assert (found[:, :, blind] == 0).all()


@each_order
@pytest.mark.parametrize(("length", "stride"), [(130, 1), (517, 4), (301, 3)])
def test_values(length: int, stride: int, strict: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(subset_attention, "_kernel", lambda: flex.flex_attention)
    for offset in range(stride):
        for known in {1, stride - 1 or 1, stride}:
            by_one_kernel(length, stride, offset, strict, known)


def test_masks_are_made_once():
    """For each length, stride, offset, order and number of known subsets."""
    subset_mask.cache_clear()
    every = [
        (length, stride, offset, strict, known, CPU)
        for length in (129, 130)
        for stride in (2, 3)
        for offset in range(stride)
        for strict in (False, True)
        for known in range(1, stride + 1)
    ]
    first = [subset_mask(*each) for each in every]
    assert all(subset_mask(*each) is mask for each, mask in zip(every, first, strict=True))
    found = subset_mask.cache_info()
    assert (found.misses, found.hits, found.currsize) == (len(every),) * 3


def test_all_readers_share_keys_in_group_order(single):
    """The producer's own reading and the strict one of those below, until something is new."""
    tiny, length, stride = Tiny(extra={"bf16": True}), 2048, 4
    with on_one_kernel_route():
        model = tiny.model(SharingMap.parse("0_3_3_3"), single)
        contexts = model.contexts(random_tokens(tiny.vocabulary, 1, length))
        view = KVView({}, contexts.visit(stride, 0)).with_own(3, some_kv(length // stride))
        view = KVView(view.known, contexts.visit(stride, 1))
        view = view.with_own(3, some_kv(length // stride))
        below, own = view.readable(1), view.readable(3)
        assert own.kv is below.kv
        assert own.visible.block_mask is not below.visible.block_mask
        assert torch.equal(own.kv.key, view.blocks(3).concatenated().key)
        assert view.with_own(3, some_kv(length // stride)).readable(3).kv is not own.kv


def test_where_there_is_one_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "compile_fault", lambda: None)
    assert choice.has_subset_kernel(CUDA, torch.bfloat16, 64, compile_wanted=True)
    assert not choice.has_subset_kernel(CUDA, torch.bfloat16, 64, compile_wanted=False)
    assert not choice.has_subset_kernel(CPU, torch.bfloat16, 64, compile_wanted=True)
    assert not choice.has_subset_kernel(CUDA, torch.float32, 64, compile_wanted=True)
    for width in (8, 24, 80, 512):
        assert not choice.has_subset_kernel(CUDA, torch.bfloat16, width, compile_wanted=True)
    monkeypatch.setattr(choice, "compute_capability", lambda device: (7, 5))
    assert not choice.has_subset_kernel(CUDA, torch.bfloat16, 64, compile_wanted=True)


needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="inductor's CPU backend needs g++")


@pytest.mark.nightly
@needs_gxx
def test_compiled_once_for_all_masks(compilations):
    """Once for the first shape, once more for the second, and then for all."""
    for length, stride in [(2048, 4), (2051, 4), (1300, 3), (2600, 5)]:
        for strict in (False, True):
            for offset in range(stride):
                for known in range(1, stride + 1):
                    by_one_kernel(length, stride, offset, strict, known)
    assert compilations() <= 4


@pytest.mark.nightly
@needs_gxx
def test_past_the_limit_is_an_error(compilations):
    """And not full scores without a word."""
    from torch._dynamo import config

    by_one_kernel(517, 4, 0, True, 1)
    with config.patch(recompile_limit=1), pytest.raises(ConfigError, match="--no-flex-attention"):
        by_one_kernel(600, 3, 1, True, 2)


@pytest.mark.gpu
@each_order
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [2048, 4096, 2051, 4100])
def test_on_a_gpu(length: int, width: int, kv_heads: int, strict: bool):
    """Values and every gradient in bf16, of this kernel and of blocks, against fp32 on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    assert compiling.compile_fault() is None
    stride = 4
    for offset in range(stride):
        for known in (1, stride):
            order = positions(length, stride, known)
            inputs = {
                "query": heads(len(range(offset, length, stride)), 4, 1, width).bfloat16(),
                "key": heads(length, kv_heads, 2, width)[:, :, order].bfloat16(),
                "value": heads(length, kv_heads, 3, width)[:, :, order].bfloat16(),
            }
            seen = rule(length, stride, offset, strict, known)
            expected = with_gradients(partial(naive, seen=seen), inputs, "cpu")
            sizes = [len(range(j, length, stride)) for j in range(known)]
            routes = {
                "one kernel": partial(
                    attend_subset, mask=subset_mask(length, stride, offset, strict, known, CUDA)
                ),
                "blocks": partial(by_blocks, sizes=sizes, offset=offset, strict=strict),
            }
            for route, attend in routes.items():
                for name, got in with_gradients(attend, inputs, "cuda").items():
                    off = (got - expected[name]).norm() / expected[name].norm()
                    assert float(off) < 2e-2, (route, name, offset, known)


def by_blocks(
    query: Tensor, key: Tensor, value: Tensor, sizes: list[int], offset: int, strict: bool
) -> Tensor:
    return attend_blocks(query, key.split(sizes, 2), value.split(sizes, 2), offset, strict)


def naive(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.float() for x in (query, *(y.repeat_interleave(group, 1) for y in (key, value))))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -1e30)
    return scores.softmax(-1).masked_fill(~seen, 0.0) @ v


def with_gradients(
    attend: Callable[..., Tensor], inputs: dict[str, Tensor], device: str
) -> dict[str, Tensor]:
    """The output and the gradients of all inputs, fp32 on the CPU; there they are computed so."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    out = attend(*leaves.values())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    grads = torch.autograd.grad(out, list(leaves.values()), weights.to(out.device, out.dtype))
    found = {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}
    return {name: x.float().cpu() for name, x in found.items()}
