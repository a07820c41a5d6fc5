"""Attention kernels that are called below torch's front end, and the contract of each.

``scaled_dot_product_attention`` checks, pads and copies before it calls a kernel; whoever calls one
directly has to. What a kernel demands is stated here and nowhere else, and
:func:`megatron_kvshare.kernels.choice.causal_kernel` returns only what keeps it.
``tests/gpu_kernels.py`` holds stand-ins that read memory as literally as the CUDA kernels do, so
that a machine without a GPU runs the whole GPU route.

========== ======================================== ==============================================
contract   CUDA: FlashAttention 2 in torch          CPU: flash attention in torch
========== ======================================== ==============================================
layout     q, k, v ``[b, heads, tokens, d]``, any   the same, any strides
           strides but the last, which is 1; output
           and its gradient any strides
log-sum-   fp32 ``[b, heads, queries]``, **read as  any strides
exp        contiguous whatever its strides say**
dtype      fp16 or bf16, the same for all           fp32, fp64, fp16, bf16
head size  a multiple of 8, at most 256             any
heads      query heads a multiple of KV heads       the same
causal     the last query sees the last key         the first query sees the first key
all masked output 0, log-sum-exp +inf               not a number
rows       read in tiles of 128, the rest of a tile as they are
           left out
device     compute capability 8.0 and later         any
========== ======================================== ==============================================

Both are called with equally many queries and keys: then "causal" means the same for both, and no
row is masked as a whole. Source of the left column: torch's aten/src/ATen/native/transformers/cuda
(attention_backward.cu, flash_attn/flash_api.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Tensor = torch.Tensor
ops = torch.ops.aten


class CausalKernel(NamedTuple):
    """Causal attention of equally many queries and keys, heads first: ``[b, heads, tokens, d]``.

    ``forward(q, k, v)`` -> output and fp32 log-sum-exp ``[b, heads, tokens]``; ``backward(grad, q,
    k, v, output, log-sum-exp)`` -> gradients of q, k, v. Both take fewer KV heads than query heads,
    and tensors of any strides.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _require_square(q, k)
    return ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return ops._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, True
    )


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _require_square(q, k)
    q, k, v = map(_unit_stride, (q, k, v))
    return ops._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2]


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = map(_unit_stride, (q, k, v))
    lse = lse.contiguous()  # a slice of queries would be read at the wrong addresses, see above
    unused = q.new_empty(2, dtype=torch.uint64)  # the random state of a dropout that is 0
    tokens = q.shape[2]
    return ops._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, tokens, tokens, 0.0, True, unused, unused
    )


def _require_square(q: Tensor, k: Tensor) -> None:
    assert q.shape[2] == k.shape[2] > 0, "causal kernels are called with as many keys as queries"


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


CPU = CausalKernel(_cpu_forward, _cpu_backward)
CUDA = CausalKernel(_cuda_forward, _cuda_backward)
