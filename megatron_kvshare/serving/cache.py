"""The tensors of the cache: pages of keys and values, of the layers that have their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_kvshare.model.kv import KV
from megatron_kvshare.serving.layout import CacheLayout
from megatron_kvshare.serving.pages import DROPPED
from megatron_kvshare.serving.step import Tables


class PagedCache:
    """``pools``: of every producer keys and values, each ``[pages, page_size, g, d]``; on a CPU a
    head of a page is one block of memory. Allocated once."""

    def __init__(
        self,
        layout: CacheLayout,
        pages: Sequence[int],
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.pages = tuple(pages)
        self.group_of = {
            producer: number
            for number, group in enumerate(layout.groups)
            for producer in group.producers
        }
        heads = layout.kv_width // head_dim
        self.pools: Mapping[int, KV] = {
            producer: KV(
                *(
                    _pool(pages[number], layout.page_size, heads, head_dim, dtype, device)
                    for _ in range(2)
                )
            )
            for producer, number in self.group_of.items()
        }

    @property
    def nbytes(self) -> int:
        """What the tensors take."""
        return sum(x.untyped_storage().nbytes() for kv in self.pools.values() for x in kv)

    def write(self, producer: int, tables: Tables, start: int, new: KV) -> None:
        """Keys and values, each ``[tokens, g, d]``, of positions ``start..`` of a sequence; those
        whose page has been dropped already are left out."""
        size, table = self.layout.page_size, tables[self.group_of[producer]]
        end = start + new.key.shape[0]
        for index in range(start // size, -(-end // size)):
            if table[index] == DROPPED:
                continue
            first, last = max(start, index * size), min(end, (index + 1) * size)
            for pool, x in zip(self.pools[producer], new, strict=True):
                page = pool[table[index]]
                page[first - index * size : last - index * size] = x[first - start : last - start]

    def read(self, producer: int, tables: Tables, tokens: int) -> KV:
        """Positions ``0..tokens - 1``, each ``[tokens, 1, g, d]``; dropped ones hold anything."""
        table = tables[self.group_of[producer]][: -(-tokens // self.layout.page_size)]
        index = torch.tensor(table).clamp_(min=0)
        parts = []
        for pool in self.pools[producer]:
            found = pool[index.to(pool.device)].transpose(1, 2)  # [pages, g, page_size, d]
            heads_first = found.transpose(0, 1).flatten(1, 2)[:, :tokens]  # [g, tokens, d]
            parts.append(heads_first.transpose(0, 1).unsqueeze(1))
        return KV(*parts)

    def set_aside(self, tables: Tables) -> list[torch.Tensor]:
        """A copy in host memory of all pages of a sequence."""
        return [
            pool[index.to(pool.device)].cpu()
            for producer, index in self._indices(tables)
            for pool in self.pools[producer]
        ]

    def put_back(self, tables: Tables, saved: Sequence[torch.Tensor]) -> None:
        """What :meth:`set_aside` returned, into other pages."""
        left = iter(saved)
        for producer, index in self._indices(tables):
            for pool in self.pools[producer]:
                pool[index.to(pool.device)] = next(left).to(pool.device)

    def _indices(self, tables: Tables) -> list[tuple[int, torch.Tensor]]:
        kept = [
            torch.tensor([x for x in table if x != DROPPED], dtype=torch.long) for table in tables
        ]
        return [(producer, kept[number]) for producer, number in self.group_of.items()]


def _pool(
    pages: int, size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Zeros: what a masked product reads must be finite."""
    if device.type == "cpu":
        shape = (pages, heads, size, head_dim)
        return torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
    return torch.zeros((pages, size, heads, head_dim), dtype=dtype, device=device)
