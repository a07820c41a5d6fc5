"""Splitting a projection into heads that are rotated by their positions, or not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_kvshare.kernels import choice
from megatron_kvshare.kernels.compiling import changing, compiled

Tensor = torch.Tensor


class Heads(NamedTuple):
    """``count`` heads side by side in a projection; ``rotated`` by their positions, or not."""

    count: int
    rotated: bool


def split_heads(
    projected: Tensor,
    head_dim: int,
    parts: tuple[Heads, ...],
    table: tuple[Tensor, Tensor],
    compile_wanted: bool,
) -> tuple[Tensor, ...]:
    """``[s, b, all heads * d]`` -> one ``[s, b, heads, d]`` for each part, rotated where asked by
    ``table``: cosines and sines, each ``[1 or b, 1, s, d]``.

    Splitting, rotating and laying each head out as a block of memory, as attention kernels like it,
    is one node of the graph: forward and backward read and write every element once.
    """
    is_compiled = choice.is_compiled(projected.device, compile_wanted)
    node = _CompiledSplitHeads if is_compiled else _SplitHeads
    return node.apply(projected, head_dim, parts, *table)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        head_dim: int,
        parts: tuple[Heads, ...],
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.head_dim, ctx.parts = head_dim, parts
        ctx.save_for_backward(cos, sin)
        outputs = []
        for x, part in zip(_by_part(projected, head_dim, parts), parts, strict=True):
            out = x.new_empty(x.shape)
            _rotate(x, cos, sin, out) if part.rotated else out.copy_(x)
            outputs.append(out.permute(2, 0, 1, 3))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        s, b, _, d = grads[0].shape
        projected = grads[0].new_empty(s, b, d * sum(part.count for part in ctx.parts))
        views = _by_part(projected, ctx.head_dim, ctx.parts)
        for out, grad, part in zip(views, grads, ctx.parts, strict=True):
            x = grad.permute(1, 2, 0, 3)
            _rotate(x, cos, -sin, out) if part.rotated else out.copy_(x)
        return projected, None, None, None, None


class _CompiledSplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        head_dim: int,
        parts: tuple[Heads, ...],
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.parts = parts
        ctx.save_for_backward(cos, sin)
        tables = (changing(x, 2) for x in (cos, sin))
        outputs = compiled(split_forward)(changing(projected, 0, 1), head_dim, parts, *tables)
        return tuple(out.permute(2, 0, 1, 3) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tables = (changing(x, 2) for x in ctx.saved_tensors)
        heads_first = tuple(changing(grad.permute(1, 2, 0, 3), 0, 2) for grad in grads)
        return compiled(split_backward)(heads_first, ctx.parts, *tables), None, None, None, None


def split_forward(
    projected: Tensor, head_dim: int, parts: tuple[Heads, ...], cos: Tensor, sin: Tensor
) -> list[Tensor]:
    """``[s, b, all heads * d]`` -> one whole block of memory ``[b, heads, s, d]`` for each part."""
    outputs = []
    for x, part in zip(_by_part(projected, head_dim, parts), parts, strict=True):
        out = _rotated(x, cos, sin) if part.rotated else x
        outputs.append(out.clone(memory_format=torch.contiguous_format))
    return outputs


def split_backward(
    grads: tuple[Tensor, ...], parts: tuple[Heads, ...], cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of the projection, from those of the parts ``[b, heads, s, d]``."""
    turned = [
        _rotated(grad, cos, -sin) if part.rotated else grad
        for grad, part in zip(grads, parts, strict=True)
    ]
    return torch.cat([x.permute(2, 0, 1, 3) for x in turned], dim=2).flatten(2).contiguous()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def _by_part(projected: Tensor, head_dim: int, parts: tuple[Heads, ...]) -> tuple[Tensor, ...]:
    """Views ``[b, heads, s, d]`` of a projection."""
    heads = projected.unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)
    return heads.split([part.count for part in parts], dim=1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    torch.mul(x, cos, out=out)
    out.addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
