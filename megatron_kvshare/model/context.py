"""What all layers of one forward share and none of them changes (L3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.model.rotary import Rotary, rotary
from megatron_kvshare.model.visibility import SequenceLayout, Visibility
from megatron_kvshare.sharing.map import SharingMap


@dataclass(frozen=True)
class SequenceContext:
    """Rotary tables of the query positions and the visibility of each kind of layer in the map."""

    rotary: Rotary
    by_kind: Mapping[tuple[bool, bool], Visibility]
    sharing: SharingMap

    def visibility(self, layer: int) -> Visibility:
        return self.by_kind[_kind(self.sharing, layer)]


def _kind(sharing: SharingMap, layer: int) -> tuple[bool, bool]:
    return sharing.is_upward(layer), sharing.windowed[layer]


def sequence_context(
    config: ModelConfig,
    sharing: SharingMap,
    window_size: int | None,
    layout: SequenceLayout,
    position_ids: torch.Tensor | None,
    dtype: torch.dtype,
) -> SequenceContext:
    """``position_ids`` ``[b, s]`` when documents restart their positions, else None for 0..s-1."""
    positions = position_ids
    if positions is None:
        positions = torch.arange(layout.length, device=layout.device)
    if layout.query_positions is not None:
        positions = positions[..., layout.query_positions]
    kinds = {_kind(sharing, layer) for layer in range(sharing.num_layers)}
    by_kind = {
        (strict, windowed): layout.visibility(strict, window_size if windowed else None)
        for strict, windowed in kinds
    }
    return SequenceContext(rotary(positions, config, dtype), by_kind, sharing)
