"""Attention of one interleaved token subset over the keys and values of all of them.

Queries are the tokens ``t = i * stride + offset``, key block ``j`` holds ``u = i' * stride + j``.
Then ``u < t`` reads ``i' <= i`` for ``j < offset`` and ``i' < i`` for the others: every pair of
blocks is causal or strictly causal, and needs no mask. The blocks' outputs are combined by their
log-sum-exps, and since the backward of a flash kernel needs nothing but the final output and
log-sum-exp, it runs block by block too (as in ring attention, arXiv 2310.01889, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_kvshare.kernels.choice import causal_kernel
from megatron_kvshare.kernels.flash import CausalKernel

Tensor = torch.Tensor


def attend_blocks(
    query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], offset: int, strict: bool
) -> Tensor:
    """``[b, n, q, d]`` queries over blocks ``0..`` of keys and values ``[b, g, k, d]``.

    ``strict``: token t sees tokens < t, else <= t. A query that sees nothing gives exactly 0.
    """
    causal_blocks = offset if strict else offset + 1
    return _BlockAttention.apply(query, causal_blocks, *keys, *values)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, causal_blocks: int, *keys_values: Tensor) -> Tensor:
        kernel = _kernel_for(query)
        keys, values = _halves(keys_values)
        out = query.new_zeros(query.shape, dtype=torch.float32)
        lse = out.new_full(query.shape[:3], float("-inf"))
        for block, (k, v) in enumerate(zip(keys, values, strict=True)):
            first, last = _overlap(query, k, block < causal_blocks)
            if last > 0:
                parts = kernel.forward(query[:, :, first:], k[:, :, :last], v[:, :, :last])
                _merge_(out[:, :, first:], lse[:, :, first:], *parts)
        out = out.to(query.dtype)
        ctx.causal_blocks = causal_blocks
        ctx.save_for_backward(query, out, lse, *keys_values)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, *keys_values = ctx.saved_tensors
        kernel = _kernel_for(query)
        keys, values = _halves(keys_values)
        grad_query = torch.zeros_like(query, dtype=torch.float32)
        grad_keys, grad_values = [], []
        for block, (k, v) in enumerate(zip(keys, values, strict=True)):
            first, last = _overlap(query, k, block < ctx.causal_blocks)
            if last <= 0:
                grad_keys.append(torch.zeros_like(k))
                grad_values.append(torch.zeros_like(v))
                continue
            g, q, o, total = (x[:, :, first:] for x in (grad, query, out, lse))
            of_q, of_k, of_v = kernel.backward(g, q, k[:, :, :last], v[:, :, :last], o, total)
            grad_query[:, :, first:] += of_q
            grad_keys.append(F.pad(of_k, (0, 0, 0, k.shape[2] - last)))
            grad_values.append(F.pad(of_v, (0, 0, 0, k.shape[2] - last)))
        return grad_query.to(query.dtype), None, *grad_keys, *grad_values


def _kernel_for(query: Tensor) -> CausalKernel:
    kernel = causal_kernel(query.device, query.dtype, query.shape[-1])
    assert kernel is not None, "no kernel for these blocks: they need a mask"
    return kernel


def _halves(tensors: Any) -> tuple[Any, Any]:
    half = len(tensors) // 2
    return tensors[:half], tensors[half:]


def _overlap(query: Tensor, key: Tensor, causal: bool) -> tuple[int, int]:
    """First query that sees anything of a block, and how many of its keys any query sees.

    Strictly causal is causal for queries 1.. and keys ..-2.
    """
    if causal:
        return 0, min(query.shape[2], key.shape[2])
    return 1, min(query.shape[2] - 1, key.shape[2])


def _merge_(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add a block to the softmax-weighted mean ``out`` ``[b, n, q, d]`` over the blocks so far."""
    total = torch.logaddexp(lse, more_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.addcmul_(more.float(), (more_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)
