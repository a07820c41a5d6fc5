"""Interleaved token subsets: what a strided sweep visits one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_kvshare.sharing.plan import subset_length


def split_tokens(x: torch.Tensor, stride: int) -> tuple[torch.Tensor, ...]:
    """``[s, ...]`` -> ``stride`` tensors; number ``offset`` has tokens ``offset::stride``.

    Under sequence parallelism every rank splits its own part of the sequence. The subsets of all
    ranks, one after another, are those of the whole, because each part is a multiple of the stride.
    """
    if stride == 1:
        return (x,)
    length = x.shape[0]
    rows = _padded(x, -(-length // stride) * stride, 0).unflatten(0, (-1, stride)).unbind(1)
    lengths = [subset_length(length, stride, offset) for offset in range(stride)]
    # A slice of everything would cost a tensor of zeros in backward.
    return tuple(
        part if part.shape[0] == own else part[:own]
        for part, own in zip(rows, lengths, strict=True)
    )


def join_tokens(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The inverse of :func:`split_tokens`, along dimension ``dim``."""
    if len(parts) == 1:
        return parts[0]
    length, longest = sum(part.shape[dim] for part in parts), parts[0].shape[dim]
    even = torch.stack([_padded(part, longest, dim) for part in parts], dim + 1)
    joined = even.flatten(dim, dim + 1)
    return joined if joined.shape[dim] == length else joined.narrow(dim, 0, length)


def _padded(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim)
