"""RMSNorm, and the sum of two tensors with the RMSNorm of it: ``x / rms(x) * weight`` over the last
dimension, computed in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_kvshare.kernels import choice
from megatron_kvshare.kernels.compiling import as_rows, compiled

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, compile_wanted: bool) -> Tensor:
    """``[.., h]`` -> ``[.., h]``."""
    if choice.is_compiled(x.device, compile_wanted):
        return _CompiledNorm.apply(x, weight, epsilon)
    if choice.on_gpu(x.device):
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return _CpuNorm.apply(x, weight, epsilon)


def add_rms_norm(
    x: Tensor, more: Tensor, weight: Tensor, epsilon: float, compile_wanted: bool
) -> tuple[Tensor, Tensor]:
    """``x + more`` and the norm of it."""
    if choice.is_compiled(x.device, compile_wanted):
        return _CompiledAddNorm.apply(x, more, weight, epsilon)
    total = x + more
    return total, rms_norm(total, weight, epsilon, compile_wanted)


class _CpuNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        mean_square = torch.linalg.vecdot(wide, wide).div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_().unsqueeze(-1)
        normed = wide * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        wide = grad.float()
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = wide * weight
        mean = torch.linalg.vecdot(grad_normed, normed).div_(normed.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(grad_normed, normed, mean, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), grad_weight, None


class _CompiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed, scale = compiled(norm_forward)(as_rows(x), weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        of_x, of_weight = compiled(norm_backward)(as_rows(grad), as_rows(x), as_rows(scale), weight)
        return of_x.view(x.shape), of_weight, None


class _CompiledAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, scale = compiled(add_norm_forward)(
            as_rows(x), as_rows(more), weight, epsilon
        )
        total = total.view(x.shape)
        ctx.save_for_backward(total, scale, weight)
        return total, normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, scale, weight = ctx.saved_tensors
        rows = (as_rows(each) for each in (grad_total, grad, total, scale))
        of_total, of_weight = compiled(add_norm_backward)(*rows, weight)
        of_total = of_total.view(total.shape)
        return of_total, of_total, of_weight, None


def norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``[n, h]`` -> its norm, and the fp32 scale ``[n, 1]``."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * scale * weight).to(x.dtype), scale


def norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``."""
    wide, of_weight = _wide_backward(grad, x, scale, weight)
    return wide.to(x.dtype), of_weight


def add_norm_forward(
    x: Tensor, more: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum in the type of the operands; its norm and scale, of the sum as it was rounded."""
    # Inductor keeps what it fuses in fp32: the type is changed for it to be what is read later.
    total = (x.float() + more.float()).to(x.dtype)
    return total, *norm_forward(total, weight, epsilon)


def add_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of either operand, with what comes past the norm, and of ``weight``."""
    wide, of_weight = _wide_backward(grad, total, scale, weight)
    return (grad_total.float() + wide).to(total.dtype), of_weight


def _wide_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    normed, wide = x.float() * scale, grad.float()
    of_weight = (wide * normed).sum(0).to(weight.dtype)
    of_normed = wide * weight
    mean = (of_normed * normed).mean(-1, keepdim=True)
    return (of_normed - normed * mean) * scale, of_weight
