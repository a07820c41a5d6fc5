"""Products whose weight gradient goes straight to DDP.

megatron-core's data-parallel wrapper keeps one fp32 buffer of gradients and adds every parameter's
gradient to it. Writing the product ``dy^T x`` there at once spares a tensor of the weight's size
and one pass over the buffer for every use of the weight, and under bf16 the rounding of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from megatron_kvshare.kernels.thin_product import thin_linear

ALL_ROWS = slice(None)


def accumulate_in_place(
    weights: Iterable[torch.nn.Parameter], embedding: torch.nn.Parameter | None, overlap: bool
) -> None:
    """Let products add to ``main_grad`` of their weights, where they can.

    ``overlap``: gradients are reduced while backward runs, as soon as autograd announces them. It
    announces none that it has not seen, so products do, but for the ``embedding``'s: that it sees.
    """
    for weight in weights:
        weight.adds_in_place = _adds(weight)  # type: ignore[attr-defined]
        weight.announces = overlap and weight is not embedding  # type: ignore[attr-defined]


def _adds(weight: torch.nn.Parameter) -> bool:
    """Whether there is a product of the weight's type that adds to its buffer."""
    if weight.dtype == weight.main_grad.dtype:  # type: ignore[attr-defined]
        return True
    return adds_in_fp32(weight.dtype, weight.device)


@cache
def adds_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of such matrices to one in fp32: new versions do for 16-bit
    types on GPUs, older ones refuse the sum or the argument. Tries it, once."""
    ones, out = (torch.ones(16, 16, dtype=kind, device=device) for kind in (dtype, torch.float32))
    try:
        torch.addmm(out, ones, ones, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 17).all())


def gradient_target(
    weight: torch.Tensor, rows: slice = ALL_ROWS
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some ``rows`` of a weight for a product, and the part of its buffer that the product has to
    add their gradient to; None where autograd does."""
    if not (torch.is_grad_enabled() and getattr(weight, "adds_in_place", False)):
        return weight if rows == ALL_ROWS else weight[rows], None
    held = _Announced.apply(weight) if weight.announces else weight
    return held if rows == ALL_ROWS else held[rows], weight.main_grad[rows]


class _Announced(torch.autograd.Function):
    """A weight whose gradient autograd takes for seen, when the last product has added it."""

    @staticmethod
    def forward(ctx: Any, weight: torch.nn.Parameter) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _: None) -> None:
        weight = ctx.weight
        weight.grad_added_to_main_grad = True
        weight.grad = weight.new_zeros(()).expand(weight.shape)  # what DDP looks for; never read


def read_for_few_rows(weights: Iterable[torch.nn.Parameter]) -> None:
    """Let products with few rows take the kernel for them: for models that only generate."""
    for weight in weights:
        weight.for_few_rows = True  # type: ignore[attr-defined]


def is_for_few_rows(weight: torch.Tensor) -> bool:
    return getattr(weight, "for_few_rows", False) and not torch.is_grad_enabled()


def local_linear(x: torch.Tensor, weight: torch.Tensor, rows: slice = ALL_ROWS) -> torch.Tensor:
    """``x [.., in] -> [.., rows]`` with some ``rows`` of ``weight [out, in]``."""
    if is_for_few_rows(weight):
        return thin_linear(x, weight[rows])
    part, buffer = gradient_target(weight, rows)
    if buffer is not None:
        return _LinearIntoBuffer.apply(x, part, buffer)
    return F.linear(x, weight) if rows == ALL_ROWS else _LinearOfRows.apply(x, weight, rows)


class _LinearOfRows(torch.autograd.Function):
    """With the whole weight kept for backward: a part of it would hold the memory of a weight that
    an engine gathers for every use and lets go after it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return F.linear(x, weight[rows])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        of_weight = torch.zeros_like(weight)
        torch.mm(grad.flatten(0, -2).t(), x.flatten(0, -2), out=of_weight[ctx.rows])
        return grad.matmul(weight[ctx.rows]), of_weight, None


class _LinearIntoBuffer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient  # not a saved tensor: it changes with every use of the weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight = ctx.saved_tensors
        add_product_(ctx.gradient, grad.flatten(0, -2).t(), x.flatten(0, -2))
        return grad.matmul(weight), None, None


def add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out += a @ b`` in fp32, whatever the type of ``a`` and ``b``. The product is rounded to
    that type only on a GPU whose torch can do no better."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif adds_in_fp32(a.dtype, a.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        out.add_(torch.mm(a, b))
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
