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

    def peak_pages(self, tokens: int, page_size: int) -> int:
        """The same while a chunk of a prompt is run: beside what it leaves, what it reads."""
        whole = -(-tokens // page_size)
        return min(whole, 2 * self.most_pages(tokens, page_size))


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

    def pages_for(self, cached: int, tokens: int) -> tuple[int, ...]:
        """Pages of each group for ``cached`` tokens in all, of sequences of up to ``tokens``: where
        a window drops tokens, a share of them; enough for one sequence at least."""
        pages = []
        for group in self.groups:
            most = group.most_pages(tokens, self.page_size)
            share = cached if group.window is None else cached * most * self.page_size // tokens
            least = 0 if group.window is None else group.peak_pages(tokens, self.page_size)
            pages.append(max(least, -(-share // self.page_size)))
        return tuple(pages)

    def pages_within(self, budget: int, tokens: int) -> tuple[int, ...]:
        """The pages of each group that ``budget`` bytes hold, in the proportion in which sequences
        of ``tokens`` need them."""
        low, high = 0, budget
        while low < high:  # the most tokens whose pages fit
            middle = (low + high + 1) // 2
            fits = self.pages_bytes(self.pages_for(middle, tokens)) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.pages_for(low, tokens)

    def pages_bytes(self, pages: tuple[int, ...]) -> int:
        """What so many pages of each group take."""
        pairs = zip(self.groups, pages, strict=True)
        return sum(count * self.page_bytes(group) for group, count in pairs)


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
