"""Which layers have a cache, for how long a token stays in it, and what that takes (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.spec.model_spec import ModelSpec


@dataclass(frozen=True)
class CacheGroup:
    """Producers whose tokens leave the cache together: out of the ``window`` of every reader, in
    tokens, or never (None)."""

    producers: tuple[int, ...]
    window: int | None

    def first_kept(self, position: int) -> int:
        """The first position that a query at ``position``, or a later one, may see."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def most_pages(self, tokens: int, page_size: int) -> int:
        """Pages that a sequence of ``tokens`` needs at most at a time."""
        whole = -(-tokens // page_size)
        if self.window is None:
            return whole
        return min(whole, -(-self.window // page_size) + 1)


@dataclass(frozen=True)
class CacheLayout:
    """The cache of one tensor-parallel rank: of every producer keys and values of
    ``kv_heads * head_dim``, ``element_bytes`` each, in pages of ``page_size`` tokens."""

    groups: tuple[CacheGroup, ...]
    page_size: int
    kv_width: int
    element_bytes: int

    @classmethod
    def of(
        cls, spec: ModelSpec, page_size: int, element_bytes: int, tensor_parallel: int = 1
    ) -> CacheLayout:
        heads = max(1, spec.model.query_groups // tensor_parallel)
        groups = cache_groups(spec.map, spec.window_size)
        return cls(groups, page_size, heads * spec.model.head_dim, element_bytes)

    def page_bytes(self, group: CacheGroup) -> int:
        return len(group.producers) * 2 * self.kv_width * self.element_bytes * self.page_size

    @cached_property
    def token_bytes(self) -> int:
        """Of one token in every layer that has a cache."""
        return sum(self.page_bytes(group) for group in self.groups) // self.page_size

    def sequence_bytes(self, tokens: int) -> int:
        """Pages that one sequence of ``tokens`` holds at most."""
        return sum(
            group.most_pages(tokens, self.page_size) * self.page_bytes(group)
            for group in self.groups
        )

    def pages_for(self, sequences: int, tokens: int) -> tuple[int, ...]:
        """Pages of each group that so many sequences of ``tokens`` need."""
        return tuple(sequences * group.most_pages(tokens, self.page_size) for group in self.groups)

    def pages_within(self, budget: int, tokens: int) -> tuple[int, ...]:
        """The pages of each group that ``budget`` bytes hold, in the proportion in which sequences
        of ``tokens`` need them."""
        needed = [group.most_pages(tokens, self.page_size) for group in self.groups]
        each = self.sequence_bytes(tokens)
        return tuple(budget * pages // each for pages in needed)


def cache_groups(map: SharingMap, window_size: int | None) -> tuple[CacheGroup, ...]:
    """Producers that every reader sees through a window apart from the others."""
    kept: list[int] = []
    trimmed: list[int] = []
    for producer in map.producers:
        readers = (producer, *map.consumers_of(producer))
        through_window = window_size is not None and all(map.windowed[x] for x in readers)
        (trimmed if through_window else kept).append(producer)
    groups = (CacheGroup(tuple(kept), None), CacheGroup(tuple(trimmed), window_size))
    return tuple(group for group in groups if group.producers)
