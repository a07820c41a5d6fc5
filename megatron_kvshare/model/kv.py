"""Keys and values on their way between layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_kvshare.model.tokens import join_tokens, split_tokens

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
