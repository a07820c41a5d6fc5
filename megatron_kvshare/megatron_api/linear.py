"""A matrix product without tensor parallelism, whose weight gradient goes straight to DDP.

megatron-core's data-parallel wrapper keeps one fp32 buffer of gradients and adds every parameter's
gradient to it. Writing the product ``dy^T x`` there at once spares a tensor of the weight's size,
its pages and one pass over the buffer; for a small model on the CPU that is a few percent of a
step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Let :func:`local_linear` add to ``main_grad`` where a weight's own type is the buffer's.

    Not for overlapped gradient reduction, which counts the gradients that autograd announces.
    """
    for parameter in model.parameters():
        parameter.adds_in_place = parameter.dtype == parameter.main_grad.dtype


ALL_ROWS = slice(None)


def local_linear(x: torch.Tensor, weight: torch.Tensor, rows: slice = ALL_ROWS) -> torch.Tensor:
    """``x [.., in] -> [.., rows]`` with some ``rows`` of ``weight [out, in]``."""
    part = weight if rows == ALL_ROWS else weight[rows]
    if torch.is_grad_enabled() and getattr(weight, "adds_in_place", False):
        return _LinearIntoBuffer.apply(x, part, weight.main_grad[rows])
    return F.linear(x, part)


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
        ctx.gradient.addmm_(grad.flatten(0, -2).t(), x.flatten(0, -2))
        return grad.matmul(weight), None, None
