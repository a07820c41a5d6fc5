"""A matrix product without tensor parallelism, whose weight gradient goes straight to DDP (L2).

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


def local_linear(x: torch.Tensor, weight: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """``x [.., in] -> [.., rows]`` with the rows of ``weight [out, in]`` from ``first_row`` on."""
    rows = weight[first_row:] if first_row else weight
    if torch.is_grad_enabled() and getattr(weight, "adds_in_place", False):
        return _LinearIntoBuffer.apply(x, rows, weight.main_grad[first_row:])
    return F.linear(x, rows)


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
