"""SwiGLU feed-forward. Source: arXiv 2002.05202."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_kvshare.megatron_api.layers import TransformerConfig
from megatron_kvshare.model.specs import LayerSpec


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
