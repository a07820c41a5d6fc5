"""Which keys a query sees (L3): causal or strictly causal, inside a window, inside a document.

The two unrestricted cases carry no mask at all. A mask is built once per forward for each kind of
layer the map has, and shared by the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Visibility:
    """``strict``: token t sees tokens < t (an upward layer), else <= t.

    ``mask``: bool ``[1 or b, 1, queries, keys]``, or None when nothing but the order restricts.
    Rows that see nothing are listed in ``blind`` (bool ``[1 or b, queries]``): they get an
    arbitrary mask row, because a softmax over nothing is not a number, and their output is set to
    exactly 0.
    """

    strict: bool
    mask: torch.Tensor | None = None
    blind: torch.Tensor | None = None


@dataclass(frozen=True)
class SequenceLayout:
    """What the batch itself restricts: its length, its documents ``[b, s]``, a subset of queries
    ``[q]``."""

    length: int
    device: torch.device
    document_ids: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None

    def visibility(self, strict: bool, window: int | None) -> Visibility:
        """``window`` W: token t sees t-W+1..t (t-W+1..t-1 when strict)."""
        window = None if window is None or window >= self.length else window
        if window is None and self.document_ids is None and self.query_positions is None:
            return Visibility(strict)
        mask = self._mask(strict, window)
        if not strict:
            return Visibility(strict, mask)
        blind = ~mask.any(-1)
        return Visibility(strict, mask | blind.unsqueeze(-1), blind.squeeze(1))

    def _mask(self, strict: bool, window: int | None) -> torch.Tensor:
        keys = torch.arange(self.length, device=self.device)
        queries = keys if self.query_positions is None else self.query_positions
        distance = queries[:, None] - keys[None, :]
        mask = distance > 0 if strict else distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        mask = mask[None, None]
        if self.document_ids is not None:
            of_query = self.document_ids[:, queries]
            mask = mask & (of_query[:, None, :, None] == self.document_ids[:, None, None, :])
        return mask
