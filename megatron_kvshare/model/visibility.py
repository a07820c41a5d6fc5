"""Which keys a query sees: causal or strictly causal, inside a window, inside a document.

What only the order of tokens restricts carries no mask, as far as the kernels know the order. A
mask is built once per forward for each kind of layer the map has, and shared by the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Visibility:
    """``strict``: token t sees tokens < t (an upward layer), else <= t.

    ``mask``: ``[1 or b, 1, queries, keys]``, added to the scores: 0 or -inf, or None when nothing
    but the order restricts. In the type of the queries, or every kernel call would make its own
    and keep it for backward. Rows that see nothing are listed in ``blind`` (bool
    ``[1 or b, queries]``, None where there are none): they get an arbitrary mask row, because a
    softmax over nothing is not a number, and their output is set to exactly 0.

    ``offset``: without a mask, the queries are the tokens ``offset::stride`` of keys in ``stride``
    interleaved blocks. ``grouped``: with a mask, leave it to the kernel that several
    query heads read one KV head (faster on the CPU, other rounding of gradients).

    ``block_mask``: the queries are a token subset, the keys in group order, for one kernel.
    """

    strict: bool
    mask: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    offset: int = 0
    grouped: bool = False
    block_mask: BlockMask | None = None


@dataclass(frozen=True)
class SequenceLayout:
    """What the batch itself restricts: its length, its documents ``[b, s]``, a subset of queries
    ``[q]``, a subset or another order of keys ``[k]``. ``dtype``: of the hidden states.
    ``first_token``: whether token 0 may be among the queries."""

    length: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    document_ids: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None
    first_token: bool = True

    def visibility(self, strict: bool, window: int | None) -> Visibility:
        """``window`` W: token t sees t-W+1..t (t-W+1..t-1 when strict)."""
        window = None if window is None or window >= self.length else window
        subset = self.query_positions is not None or self.key_positions is not None
        if window is None and self.document_ids is None and not subset:
            return Visibility(strict)
        seen = self._seen(strict, window)
        # Without windows and documents only token 0 of a strict layer sees nothing.
        restricted = window is not None or self.document_ids is not None
        if not strict or not (restricted or self.first_token):
            return Visibility(strict, self._additive(seen))
        blind = ~seen.any(-1)
        return Visibility(strict, self._additive(seen | blind.unsqueeze(-1)), blind.squeeze(1))

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, float("-inf"))

    def _seen(self, strict: bool, window: int | None) -> torch.Tensor:
        every = torch.arange(self.length, device=self.device)
        queries = every if self.query_positions is None else self.query_positions
        keys = every if self.key_positions is None else self.key_positions
        distance = queries[:, None] - keys[None, :]
        mask = distance > 0 if strict else distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        mask = mask[None, None]
        if self.document_ids is not None:
            of_query, of_key = self.document_ids[:, queries], self.document_ids[:, keys]
            mask = mask & (of_query[:, None, :, None] == of_key[:, None, None, :])
        return mask
