"""RMSNorm: the fused kernel on GPUs, one lean autograd node on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_kvshare.model import kernels


class _CpuRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        mean_square = torch.linalg.vecdot(wide, wide).div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_().unsqueeze(-1)
        normed = wide * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        wide = grad.float()
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = wide * weight
        mean = torch.linalg.vecdot(grad_normed, normed).div_(normed.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(grad_normed, normed, mean, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in fp32.

    Under sequence parallelism each rank sees part of the sequence: the weight carries
    megatron-core's ``sequence_parallel`` mark, by which its gradient is summed over the
    tensor-parallel ranks.
    """

    def __init__(
        self, size: int, epsilon: float, dtype: torch.dtype, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if kernels.on_gpu(x.device):
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return _CpuRMSNorm.apply(x, self.weight, self.epsilon)
