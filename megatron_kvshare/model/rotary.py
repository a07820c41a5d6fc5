"""Rotary position embedding, in the half-rotated layout of Llama checkpoints.

Source: RoFormer (arXiv 2104.09864); long-context scaling as in Llama 3.1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from megatron_kvshare.config import ModelConfig


class Rotary(NamedTuple):
    """Cosines and sines, each ``[1 or b, 1, s, d]``; the sine's first half is negated."""

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """``[d / 2]`` fp32 angular frequencies, scaled for long context when the configuration asks."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float()
    frequencies = 1.0 / (config.rotary_base ** (exponent / config.head_dim))
    return _scaled(frequencies, config) if config.use_rope_scaling else frequencies


def _scaled(frequencies: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, with a ramp
    between."""
    wavelength = 2 * math.pi / frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_positions / wavelength
    ramp = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * frequencies / config.rope_scaling_factor + ramp * frequencies


def rotary(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
    """Tables for ``positions``: ``[s]``, or ``[b, s]`` when documents restart their positions."""
    angles = positions.float()[..., None] * inverse_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()
    tables = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    return Rotary(*(table.reshape(-1, 1, *table.shape[-2:]).to(dtype) for table in tables))


class Heads(NamedTuple):
    """``count`` heads side by side in a projection; ``rotated`` by their positions, or not."""

    count: int
    rotated: bool


def split_heads(
    projected: torch.Tensor, head_dim: int, parts: tuple[Heads, ...], table: Rotary
) -> tuple[torch.Tensor, ...]:
    """``[s, b, all heads * d]`` -> one ``[s, b, heads, d]`` for each part, rotated where asked.

    Splitting, rotating and laying each head out as a block of memory, as attention kernels like it,
    is one node of the graph: forward and backward read and write every element once.
    """
    return _SplitHeads.apply(projected, head_dim, parts, *table)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: torch.Tensor,
        head_dim: int,
        parts: tuple[Heads, ...],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.head_dim, ctx.parts = head_dim, parts
        ctx.save_for_backward(cos, sin)
        outputs = []
        for x, part in zip(_by_part(projected, head_dim, parts), parts, strict=True):
            out = x.new_empty(x.shape)
            _rotate(x, cos, sin, out) if part.rotated else out.copy_(x)
            outputs.append(out.permute(2, 0, 1, 3))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        s, b, _, d = grads[0].shape
        projected = grads[0].new_empty(s, b, d * sum(part.count for part in ctx.parts))
        views = _by_part(projected, ctx.head_dim, ctx.parts)
        for out, grad, part in zip(views, grads, ctx.parts, strict=True):
            x = grad.permute(1, 2, 0, 3)
            _rotate(x, cos, -sin, out) if part.rotated else out.copy_(x)
        return projected, None, None, None, None


def _by_part(
    projected: torch.Tensor, head_dim: int, parts: tuple[Heads, ...]
) -> tuple[torch.Tensor, ...]:
    """Views ``[b, heads, s, d]`` of a projection."""
    heads = projected.unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)
    return heads.split([part.count for part in parts], dim=1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(x, cos, out=out)
    out.addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
