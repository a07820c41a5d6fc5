"""Hidden states and the keys and values of later stages, packed into one tensor.

Megatron-core's schedules move one 3-D tensor per cut and bring its gradient back. A payload is
``[rows, b, width]``: hidden states, then for every producer its keys and values. Rows are the
rank's tokens; under sequence parallelism the KV of the other ranks' tokens lie beside its own,
because every rank holds its KV heads of the whole sequence. Ranks that share a KV head each send
their part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_kvshare.model.attention import whole_head
from megatron_kvshare.model.block import StageTensors
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV


@dataclass(frozen=True)
class PayloadFormat:
    """What crosses one cut: hidden states of ``hidden_size``, the KV of ``producers``, and zeros;
    ``[rows, b, width]`` in all."""

    hidden_size: int
    producers: tuple[int, ...]
    shape: tuple[int, int, int]
    heads: HeadLayout
    sequence_ranks: int

    def pack(self, tensors: StageTensors) -> torch.Tensor:
        """Raises :class:`KeyError` where a producer's KV is missing."""
        hidden, kv = tensors
        parts = [hidden, *(self._folded(kv[layer]) for layer in self.producers)]
        packed = torch.cat(parts, dim=-1) if len(parts) > 1 else hidden
        padding = self.shape[-1] - packed.shape[-1]
        return F.pad(packed, (0, padding)) if padding else packed

    def unpack(self, payload: torch.Tensor) -> StageTensors:
        """The inverse of :meth:`pack`, differentiable."""
        assert payload.shape == self.shape, (payload.shape, self)
        each = 2 * self.heads.local_kv_width * self.sequence_ranks
        hidden, *kv, _ = payload.split(
            (
                self.hidden_size,
                *(each,) * len(self.producers),
                self.shape[-1] - self.hidden_size - each * len(self.producers),
            ),
            dim=-1,
        )
        unfolded = (self._unfolded(part) for part in kv)
        return StageTensors(hidden.contiguous(), dict(zip(self.producers, unfolded, strict=True)))

    def _folded(self, kv: KV) -> torch.Tensor:
        """``[s, b, g, d]`` keys and values -> ``[rows, b, 2 * sequence_ranks * kv width]``."""
        flat = torch.stack([own_part(x, self.heads) for x in kv], dim=2).flatten(2)
        return flat.unflatten(0, (-1, self.sequence_ranks)).transpose(1, 2).flatten(2)

    def _unfolded(self, folded: torch.Tensor) -> KV:
        flat = folded.unflatten(-1, (self.sequence_ranks, -1)).transpose(1, 2).flatten(0, 1)
        if self.heads.kv_heads_are_split:
            flat = whole_head(flat, self.heads)
        # Each head as one block of memory, as attention kernels like it.
        blocks = flat.unflatten(-1, (2, self.heads.local_kv_heads, -1)).permute(2, 1, 3, 0, 4)
        key, value = (x.permute(2, 0, 1, 3) for x in blocks.contiguous().unbind())
        return KV(key, value)


def own_part(x: torch.Tensor, heads: HeadLayout) -> torch.Tensor:
    """``[s, b, g, d] -> [s, b, width]``: all of it, or this rank's columns of a shared head."""
    return x.flatten(2)[..., _own_columns(heads)] if heads.kv_heads_are_split else x.flatten(2)


def spread_part(part: torch.Tensor, heads: HeadLayout) -> torch.Tensor:
    """The gradient of :func:`own_part` for the whole head: 0 in the columns of other ranks."""
    whole = part.new_zeros(*part.shape[:2], heads.head_dim)
    whole[..., _own_columns(heads)] = part
    return whole.unsqueeze(2)


def _own_columns(heads: HeadLayout) -> slice:
    start = heads.tp_rank * heads.local_kv_width - heads.kv_head_of_rank * heads.head_dim
    return slice(start, start + heads.local_kv_width)
