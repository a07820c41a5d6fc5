"""The parts of a layer besides attention, and the implementation of each that
``--transformer-impl`` chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api import layers, transformer_engine
from megatron_kvshare.megatron_api.layers import TransformerConfig
from megatron_kvshare.model import kernels


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


@dataclass(frozen=True)
class LayerSpec:
    """Constructors: ``column`` and ``row`` take (input, output, config), ``norm`` as
    :class:`RMSNorm`."""

    column: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]


def layer_spec(transformer_impl: str) -> LayerSpec:
    if transformer_impl == "local":
        return LayerSpec(layers.ColumnParallel, layers.RowParallel, RMSNorm)
    if not transformer_engine.is_available():
        raise ConfigError(
            Fault(
                "--transformer-impl",
                transformer_impl,
                "Transformer Engine cannot be imported here",
                "install transformer-engine[pytorch] on a GPU machine, or use local layers",
            )
        )
    parts = transformer_engine.load_layers()
    return LayerSpec(parts.column, parts.row, parts.norm)


def build_norm(model: ModelConfig, config: TransformerConfig) -> nn.Module:
    """The norm over hidden states, as every layer has two and the last stage a final one."""
    return layer_spec(model.transformer_impl).norm(
        config.hidden_size, model.norm_epsilon, config.params_dtype, config.sequence_parallel
    )


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``; ``linear_fc1`` holds this rank's rows ``[gate | up]``."""

    def __init__(self, spec: LayerSpec, config: TransformerConfig) -> None:
        super().__init__()
        self.linear_fc1 = spec.column(config.hidden_size, 2 * config.ffn_hidden_size, config)
        self.linear_fc2 = spec.row(config.ffn_hidden_size, config.hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(_GatedSiLU.apply(self.linear_fc1(x)))


class _GatedSiLU(torch.autograd.Function):
    """``[.., gate | up] -> silu(gate) * up``; backward writes both gradients into one tensor,
    uncopied."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return out
