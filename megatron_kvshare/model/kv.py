"""Keys and values on their way between layers, whole or by interleaved token subsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_kvshare.sharing.plan import subset_length

_Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class KV(NamedTuple):
    """One producer's rotated keys and its values, each ``[s, b, g, d]`` over the full sequence."""

    key: torch.Tensor
    value: torch.Tensor

    def zeros_like(self) -> KV:
        return KV(torch.zeros_like(self.key), torch.zeros_like(self.value))


class KVBlocks(NamedTuple):
    """The same for interleaved token subsets: block ``j`` holds tokens ``j::stride``.

    A block is None while nothing is known of its tokens; known blocks come first.
    """

    blocks: tuple[KV | None, ...]

    @classmethod
    def unknown(cls, stride: int) -> KVBlocks:
        return cls((None,) * stride)

    @classmethod
    def of(cls, kv: KV, stride: int) -> KVBlocks:
        parts = zip(*(split_tokens(x, stride) for x in kv), strict=True)
        return cls(tuple(KV(*part) for part in parts))

    @property
    def stride(self) -> int:
        return len(self.blocks)

    @property
    def known(self) -> tuple[KV, ...]:
        """The blocks there are, in order."""
        return tuple(block for block in self.blocks if block is not None)

    def block(self, offset: int) -> KV:
        """What is known of tokens ``offset::stride``."""
        block = self.blocks[offset]
        assert block is not None, "keys and values are missing"
        return block

    def with_block(self, offset: int, kv: KV) -> KVBlocks:
        return KVBlocks((*self.blocks[:offset], kv, *self.blocks[offset + 1 :]))

    def with_stride(self, stride: int) -> KVBlocks:
        return self if stride == self.stride else KVBlocks.of(self.whole(), stride)

    def whole(self) -> KV:
        """All tokens in their order; every block must be known."""
        assert len(self.known) == self.stride, "keys and values are missing"
        if self.stride == 1:
            return self.known[0]
        return self._combine(lambda parts: join_tokens(parts, dim=2))

    def concatenated(self) -> KV:
        """The known blocks one after another."""
        if len(self.known) == 1:
            return self.known[0]
        return self._combine(lambda parts: torch.cat(parts, dim=2))

    def _combine(self, combine: _Combine) -> KV:
        """Each head stays one block of memory, as attention kernels like it: ``[b, g, s, d]``."""
        combined = (
            combine([x.permute(1, 2, 0, 3) for x in parts]).permute(2, 0, 1, 3)
            for parts in zip(*self.known, strict=True)
        )
        return KV(*combined)


KVState = Mapping[int, KVBlocks]
"""Producer layer -> its keys and values, for one microbatch."""


@torch.no_grad()
def residual(new: KVState, old: KVState, targets: Iterable[int]) -> torch.Tensor:
    """``[||KV_n - KV_{n-1}||^2, ||KV_n||^2]`` over ``targets``, fp64 sums of this rank's heads.

    A block that ``old`` lacks counts as zero: that is what the first sweep reads.
    """
    change = total = torch.zeros((), dtype=torch.float64)
    for layer in targets:
        before = old.get(layer, KVBlocks.unknown(1))
        if before.known:
            before = before.with_stride(new[layer].stride)
        for block, now in enumerate(new[layer].known):
            was = before.blocks[block] if before.known else None
            for x, y in zip(now, was or now.zeros_like(), strict=True):
                change = change + (x - y).double().square().sum()
                total = total + x.double().square().sum()
    return torch.stack((change, total))


def relative_change(row: torch.Tensor) -> float:
    """``||KV_n - KV_{n-1}|| / ||KV_n||`` of a row of residuals."""
    change, total = row.tolist()
    return math.sqrt(change / total) if total else 0.0


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
