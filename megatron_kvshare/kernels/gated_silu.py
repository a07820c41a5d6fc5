"""SwiGLU between its two projections: ``[.., gate | up] -> silu(gate) * up``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_kvshare.kernels import choice
from megatron_kvshare.kernels.compiling import as_rows, compiled

Tensor = torch.Tensor


def gated_silu(gate_up: Tensor, compile_wanted: bool) -> Tensor:
    """Of either form, backward writes both gradients into one tensor and keeps ``gate_up``
    alone."""
    if choice.is_compiled(gate_up.device, compile_wanted):
        return _CompiledGatedSiLU.apply(gate_up)
    return _GatedSiLU.apply(gate_up)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return out


class _CompiledGatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        rows = compiled(gated_silu_forward)(as_rows(gate_up))
        return rows.unflatten(0, gate_up.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows: Tensor = compiled(gated_silu_backward)(as_rows(grad), as_rows(gate_up))
        return rows.view(gate_up.shape)


def gated_silu_forward(gate_up: Tensor) -> Tensor:
    """``[n, 2 * f]`` -> ``[n, f]``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gated_silu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of ``gate_up``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    wide, open_ = grad.float(), gate.sigmoid()
    of_gate = wide * up * open_ * (1 + gate * (1 - open_))
    return torch.cat((of_gate, wide * gate * open_), dim=-1).to(gate_up.dtype)
