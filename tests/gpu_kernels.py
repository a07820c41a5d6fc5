"""Stand-ins for a GPU's attention kernels: the whole GPU route runs on a machine without one.

They follow torch's sources (aten/src/ATen/native/transformers/cuda) in what they read and refuse,
and are written from those, not from the product: a log-sum-exp is read at the addresses that a
contiguous one would have, whatever strides the tensor says; rows come in tiles of 128, and what
lies beyond the last row of a tile is zero; a row in which everything is masked gives 0 and +inf.
Where the CUDA kernels compute in 16 bit, so do these.

`on_gpu_route()` puts them in place. `Log` counts what was called, so that a test can demand that
its route was taken.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kvshare.kernels import choice, flash
from megatron_kvshare.model import context, core_attention

TILE = 128
HALF = (torch.bfloat16, torch.float16)
_cpu_attention = F.scaled_dot_product_attention


class Log(Counter):
    """Calls by name: flash_forward, flash_backward, sliced (log-sum-exps that are no whole block of
    memory), causal, masked, one_kernel."""


@contextlib.contextmanager
def on_gpu_route() -> Iterator[Log]:
    """Inside, tensors on the CPU take every branch that those on a GPU (compute capability 9.0)
    take, and the stand-ins are the kernels there."""
    log = Log()
    with (
        mock.patch.object(choice, "on_gpu", lambda device: True),
        mock.patch.object(choice, "compute_capability", lambda device: (9, 0)),
        mock.patch.object(choice, "compile_fault", lambda: "stand-ins are not compiled"),
        mock.patch.object(flash, "ops", FlashOperators(log)),
        mock.patch.object(F, "scaled_dot_product_attention", FrontEnd(log)),
    ):
        yield log


@contextlib.contextmanager
def on_one_kernel_route() -> Iterator[Log]:
    """The same where kernels can be compiled: a subset reads all keys at once. In place of
    FlexAttention, which has no backward on a CPU, its mask is written out."""
    with (
        on_gpu_route() as log,
        mock.patch.object(context, "has_subset_kernel", lambda *kind, compile_wanted: True),
        mock.patch.object(core_attention, "attend_subset", DenseSubset(log)),
    ):
        yield log


class DenseSubset:
    """FlexAttention as its documentation has it, in fp32: all scores, each asked for."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, query, key, value, mask):
        self.log["one_kernel"] += 1
        assert mask.seq_lengths == (query.shape[2], key.shape[2])
        row, column = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), row, column)
        q, k, v = (x.float() for x in (query, *grouped(query, key, value)))
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        weights = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1)
        return (weights.masked_fill(~seen, 0.0) @ v).to(query.dtype)


class FlashOperators:
    """`aten::_scaled_dot_product_flash_attention` and its backward; nothing else is there."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def _scaled_dot_product_flash_attention(
        self, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False
    ):
        self.log["flash_forward"] += 1
        refuse_what_flash_refuses(query, key, value)
        assert dropout_p == 0.0 and not return_debug_mask
        queries, keys = query.shape[2], key.shape[2]
        q, k, v = (in_tiles(x) for x in (query, *grouped(query, key, value)))
        scores = scores_of(q, k, queries, keys, is_causal)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0).to(query.dtype)
        out = (weights.float() @ v)[:, :, :queries]
        lse = torch.where(lse == -torch.inf, torch.inf, lse)[:, :, :queries].contiguous()
        like = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        seed = torch.empty(2, dtype=torch.uint64)
        return like.copy_(out), lse, None, None, queries, keys, seed, seed[0], torch.empty(0)

    def _scaled_dot_product_flash_attention_backward(
        self, grad_out, query, key, value, out, logsumexp, *others
    ):
        *cumulative, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset = others
        self.log["flash_backward"] += 1
        refuse_what_flash_refuses(query, key, value, grad_out, out)
        assert cumulative == [None, None] and dropout_p == 0.0
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert philox_seed.dtype == philox_offset.dtype == torch.uint64
        b, heads, queries, d = query.shape
        keys, kv_heads = key.shape[2], key.shape[1]
        assert logsumexp.dtype == torch.float32 and logsumexp.shape == (b, heads, queries)
        # A caller of the real kernel may hand over a slice; its rows are not what will be read.
        self.log["sliced"] += not logsumexp.is_contiguous()
        addresses = (heads * queries, queries, 1)
        lse = torch.as_strided(logsumexp, (b, heads, queries), addresses)

        q, k, v, grad, final = (
            in_tiles(x) for x in (query, *grouped(query, key, value), grad_out, out)
        )
        lse = F.pad(lse, (0, q.shape[2] - queries))
        scores = scores_of(q, k, queries, keys, is_causal)
        weights = (scores - lse.unsqueeze(-1)).exp()
        of_weights = grad @ v.transpose(2, 3)
        dots = (grad * final).sum(-1, keepdim=True)
        of_scores = (weights * (of_weights - dots)).to(query.dtype).float() * d**-0.5
        weights = weights.to(query.dtype).float()
        of_query = (of_scores @ k)[:, :, :queries]
        of_key, of_value = (
            x[:, :, :keys].to(key.dtype).unflatten(1, (kv_heads, -1)).sum(2)
            for x in (of_scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ grad)
        )
        shaped = ((of_query, query), (of_key, key), (of_value, value))
        return tuple(torch.empty_like(like).copy_(x) for x, like in shaped)


def refuse_what_flash_refuses(query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> None:
    """The checks of `mha_fwd` and `mha_bwd`."""
    every = (query, key, value, *more)
    if query.dtype not in HALF or {x.dtype for x in every} != {query.dtype}:
        raise RuntimeError(f"FlashAttention only support fp16 and bf16: {[x.dtype for x in every]}")
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError("head_size must be a multiple of 8 of at most 256")
    if query.shape[1] % key.shape[1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def grouped(query: Tensor, *key_value: Tensor) -> tuple[Tensor, ...]:
    """One KV head for every query head."""
    return tuple(x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in key_value)


def in_tiles(x: Tensor) -> Tensor:
    """fp32, with rows up to a multiple of the tile; those beyond are zero."""
    return F.pad(x.float(), (0, 0, 0, -x.shape[2] % TILE))


def scores_of(q: Tensor, k: Tensor, queries: int, keys: int, is_causal: bool) -> Tensor:
    """Scaled scores of all tiles; -inf where a key does not exist or comes later: the last query
    sees the last key."""
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    unseen = (column >= keys).expand(q.shape[2], -1)
    if is_causal and queries > 1:
        unseen = unseen | (column > row + keys - queries)
    return scores.masked_fill(unseen, -torch.inf)


class FrontEnd:
    """`scaled_dot_product_attention` of a GPU where a fused kernel can serve; an error where torch
    would take the unfused form in silence, which holds all scores in memory."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
        self.log["causal" if attn_mask is None else "masked"] += 1
        every = (query, key, value)
        assert len({x.dtype for x in every}) == 1
        fused = all(x.stride(-1) == 1 for x in every)
        flash = query.dtype in HALF and attn_mask is None
        fused &= flash or query.shape[1] == key.shape[1]  # only flash and cuDNN take fewer KV heads
        fused &= flash or query.shape[-1] % (8 if query.dtype in HALF else 4) == 0
        if is_causal:
            fused &= query.shape[2] == key.shape[2]
        if attn_mask is not None:
            assert attn_mask.dtype == query.dtype and attn_mask.stride(-1) == 1
            assert not (attn_mask == -torch.inf).all(-1).any(), "a row sees nothing: undefined"
        assert fused, "no fused kernel takes this"
        return _cpu_attention(
            *every, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa
        )


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` over pages, by its documentation: the last query of a
    sequence is aligned with its last key; the window counts keys to the left and right of that."""
    assert cu_seq_k is None and max_q == 1 and block_table.dtype == seqused_k.dtype == torch.int32
    assert cu_seq_q.tolist() == list(range(len(query) + 1))
    assert enable_gqa == (query.shape[1] != key.shape[2])
    left, right = window_size
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
    size = key.shape[1]
    outputs = []
    for row, used, pages in zip(query, seqused_k.tolist(), block_table.tolist(), strict=True):
        assert used <= max_k and -(-used // size) <= len(pages)
        if not used:
            outputs.append(torch.full_like(row, torch.nan))  # nothing to see: undefined
            continue
        first = 0 if left < 0 else max(0, used - 1 - left)
        seen = torch.arange(first, used)
        where = torch.tensor(pages)[seen // size], seen % size
        keys, values = (x[where].transpose(0, 1)[None] for x in (key, value))
        keys, values = grouped(row[None, :, None], keys, values)
        scores = (row[None, :, None].float() @ keys.float().transpose(2, 3)) * row.shape[-1] ** -0.5
        outputs.append((scores.softmax(-1) @ values.float())[0, :, 0].to(row.dtype))
    return torch.stack(outputs)
