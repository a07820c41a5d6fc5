"""One new token of every sequence, over keys and values in pages: what decoding runs the layers
with. Each layer runs once, bottom to top: a layer that reads above itself finds the tokens before,
another one its own token too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_kvshare.kernels.paged_attention import PagedKV, PageTable, Reach, reach
from megatron_kvshare.model.context import VisitContext
from megatron_kvshare.model.kv import KV
from megatron_kvshare.model.kv_view import Readable
from megatron_kvshare.model.rotary import rotary
from megatron_kvshare.model.visibility import SequenceLayout, Visibility
from megatron_kvshare.spec.model_spec import ModelSpec


class Place(NamedTuple):
    """Where the new tokens' keys and values belong: page and place in it, each ``[b]``; and the
    pages of their sequences."""

    page: torch.Tensor
    slot: torch.Tensor
    table: PageTable


@dataclass(frozen=True)
class PagedView:
    """A view (see :class:`megatron_kvshare.model.kv_view.View`) that writes what layers make into
    the ``pools`` ``[pages, page_size, g, d]``, in place; ``places``: of every producer.

    ``positions`` ``[b]``: of the new tokens. ``kinds``: a :class:`Reach` by producer, strictness
    and window; made once, for all layers.
    """

    context: VisitContext
    pools: Mapping[int, KV]
    places: Mapping[int, Place]
    kinds: Mapping[tuple[int, bool, bool], Reach]

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        pools: Mapping[int, KV],
        places: Mapping[int, Place],
        positions: torch.Tensor,
        dtype: torch.dtype,
    ) -> PagedView:
        context = VisitContext(
            rotary(positions[:, None], spec.model, dtype),
            spec,
            SequenceLayout(1, positions.device, dtype),
            blockwise=False,
            one_kernel=False,
        )
        return cls(context, pools, places, _kinds(spec, pools, places, positions))

    def with_own(self, producer: int, own: KV) -> PagedView:
        """Writes ``own``, each ``[1, b, g, d]``."""
        page, slot, _ = self.places[producer]
        for pool, new in zip(self.pools[producer], own, strict=True):
            pool[page, slot] = new[0]
        return self

    def readable(self, layer: int) -> Readable:
        sharing = self.context.spec.map
        producer, strict = sharing.sources[layer], sharing.is_upward(layer)
        seen = self.kinds[producer, strict, sharing.windowed[layer]]
        source = PagedKV(*self.pools[producer], self.places[producer].table, seen)
        return Readable(source, Visibility(strict))


def _kinds(
    spec: ModelSpec,
    pools: Mapping[int, KV],
    places: Mapping[int, Place],
    positions: torch.Tensor,
) -> dict[tuple[int, bool, bool], Reach]:
    """Producers whose tokens lie alike share a mask."""
    kinds: dict[tuple[int, bool, bool], Reach] = {}
    same: dict[tuple[int, bool, bool], Reach] = {}
    for layer, producer in enumerate(spec.map.sources):
        strict, windowed = spec.map.is_upward(layer), spec.map.windowed[layer]
        table = places[producer].table
        alike = (id(table), strict, windowed)
        if alike not in same:
            limit = positions if strict else positions + 1
            # A strict query sees the window's tokens but its own.
            window = spec.window_size if windowed else None
            window = window - 1 if window is not None and strict else window
            same[alike] = reach(table, limit, window, pools[producer].key)
        kinds[producer, strict, windowed] = same[alike]
    return kinds
