"""Softmax attention of queries over a producer's keys and values, on torch's SDPA kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_kvshare.kernels import choice
from megatron_kvshare.kernels.paged_attention import PagedKV, attend_pages
from megatron_kvshare.kernels.subset_attention import attend_subset
from megatron_kvshare.model.block_attention import attend_blocks
from megatron_kvshare.model.kv import KV, KVBlocks
from megatron_kvshare.model.visibility import Visibility


def attend(
    query: torch.Tensor, source: KV | KVBlocks | PagedKV, visible: Visibility
) -> torch.Tensor:
    """``[q, b, n, d]`` queries over ``[s, b, g, d]`` keys and values -> ``[q, b, n * d]``.

    The causal and the strictly causal case run without a mask. The strict one (method: a token of
    an upward layer sees earlier tokens only) is the causal kernel on queries 1.. and keys ..s-2,
    and 0 for token 0. Of a token subset likewise, for each block of keys. Pages are read by one
    query of each sequence, and know what it sees.
    """
    if isinstance(source, PagedKV):
        return attend_pages(query[0], source).flatten(1).unsqueeze(0)
    if isinstance(source, KVBlocks):
        return _MergeHeads.apply(_over_blocks(query, source, visible))
    q, k, v = (_heads_first(x) for x in (query, *source))
    if visible.block_mask is not None:
        return _MergeHeads.apply(attend_subset(q, k, v, visible.block_mask))
    if visible.mask is not None:
        return _MergeHeads.apply(_masked(q, k, v, visible))
    if visible.strict:
        q, k, v = q[:, :, 1:], k[:, :, :-1], v[:, :, :-1]
    if choice.on_gpu(q.device) and q.dtype == torch.float32:
        k, v = _one_head_per_query(q, k, v)  # flash takes no fp32, its fp32 stand-in no groups
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return _MergeHeads.apply(F.pad(out, (0, 0, 1, 0)) if visible.strict else out)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(1, 2, 0, 3)


def _over_blocks(query: torch.Tensor, source: KVBlocks, visible: Visibility) -> torch.Tensor:
    keys = tuple(_heads_first(block.key) for block in source.known)
    values = tuple(_heads_first(block.value) for block in source.known)
    return attend_blocks(_heads_first(query), keys, values, visible.offset, visible.strict)


class _MergeHeads(torch.autograd.Function):
    """``[b, n, q, d] -> [q, b, n * d]``; backward hands the kernel each head in one block."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        ctx.heads = out.shape[1]
        return out.permute(2, 0, 1, 3).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.unflatten(-1, (ctx.heads, -1)).permute(1, 2, 0, 3).contiguous()


def _one_head_per_query(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    queries_per_kv = q.shape[1] // k.shape[1]
    if queries_per_kv == 1:
        return k, v
    return k.repeat_interleave(queries_per_kv, dim=1), v.repeat_interleave(queries_per_kv, dim=1)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility) -> torch.Tensor:
    if choice.on_gpu(q.device) or not visible.grouped:
        k, v = _one_head_per_query(q, k, v)  # the masked GPU kernels take no grouped heads
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, enable_gqa=grouped)
    if visible.blind is None:
        return out
    return out.masked_fill(visible.blind[:, None, :, None], 0.0)
