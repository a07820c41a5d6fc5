"""A request on its way through the engine, and the pages it holds (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_kvshare.serving.layout import CacheGroup
from megatron_kvshare.serving.pages import DROPPED, PagePool
from megatron_kvshare.serving.request import Request
from megatron_kvshare.serving.step import Tables


@dataclass(eq=False)
class Sequence:
    """``computed``: tokens whose keys and values are in the cache; of the others all but the last
    belong to the prompt. ``aside``: its pages are in host memory. ``most``: tokens it can grow to.
    """

    number: int
    request: Request
    seed: int
    most: int
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    aside: bool = False
    tables: list[list[int]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def is_full(self) -> bool:
        """It has all the tokens that it can have."""
        return len(self.tokens) >= self.most

    @property
    def is_prefilled(self) -> bool:
        return self.computed >= self.prompt_length

    @property
    def frozen_tables(self) -> Tables:
        return tuple(map(tuple, self.tables))


class SequencePages:
    """Gives sequences their pages in every group of the cache."""

    def __init__(self, groups: tuple[CacheGroup, ...], pages: tuple[int, ...], size: int) -> None:
        self.groups = groups
        self.pools = tuple(map(PagePool, pages))
        self.size = size

    @property
    def shares_prefixes(self) -> bool:
        """Where a group drops pages, the beginning of a prompt is not kept whole."""
        return all(group.window is None for group in self.groups)

    def missing(self, sequence: Sequence, tokens: int) -> list[int]:
        """Pages of each group that ``sequence`` lacks to hold its first ``tokens``."""
        counts = []
        for group, table in zip(self.groups, sequence.tables, strict=True):
            first = max(len(table), group.first_kept(tokens - 1) // self.size)
            counts.append(max(0, -(-tokens // self.size) - first))
        return counts

    def fit(self, counts: list[int], spare: int = 0) -> bool:
        """Whether so many pages of each group are to be had."""
        pairs = zip(self.pools, counts, strict=True)
        return all(pool.available >= count + (spare if count else 0) for pool, count in pairs)

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Pages for the first ``tokens``, but for those that no later query sees."""
        for group, pool, table in zip(self.groups, self.pools, sequence.tables, strict=True):
            kept = group.first_kept(tokens - 1) // self.size
            for index in range(len(table), -(-tokens // self.size)):
                table.append(DROPPED if index < kept else pool.take())

    def trim(self, sequence: Sequence, position: int) -> None:
        """Let go of what a query at ``position``, or a later one, does not see."""
        for group, pool, table in zip(self.groups, self.pools, sequence.tables, strict=True):
            kept = min(len(table), group.first_kept(position) // self.size)
            index = kept - 1
            while index >= 0 and table[index] != DROPPED:
                pool.release((table[index],))
                table[index] = DROPPED
                index -= 1

    def replace(self, sequence: Sequence) -> None:
        """Other pages in place of those that were let go, in the same places of its tables."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            table[:] = [DROPPED if page == DROPPED else pool.take() for page in table]

    def held(self, sequence: Sequence) -> list[int]:
        """Pages of each group."""
        return [sum(page != DROPPED for page in table) for table in sequence.tables]

    def release(self, sequence: Sequence) -> None:
        """Let go of every page; the tables stay as they are."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            pool.release(table)

    def reuse(self, sequence: Sequence) -> int:
        """Begin with pages that others have made of the same tokens; how many tokens they hold. The
        last token of a prompt is never among them: the next one is drawn after it."""
        usable = (sequence.prompt_length - 1) // self.size
        found = 0
        while found < usable:
            pages = [pool.find(sequence.keys[found]) for pool in self.pools]
            if None in pages:
                break
            for pool, table, page in zip(self.pools, sequence.tables, pages, strict=True):
                assert page is not None
                pool.share(page)
                table.append(page)
            found += 1
        return found * self.size

    def publish(self, sequence: Sequence) -> None:
        """Let others find the full pages of the prompt."""
        full = min(sequence.computed, sequence.prompt_length) // self.size
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for page, key in zip(table[:full], sequence.keys[:full], strict=True):
                pool.name(page, key)
