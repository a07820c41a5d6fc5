"""Pages of the cache: who has them, which of them can be used again (no torch)."""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

DROPPED = -1
"""In a sequence's table: a page that has left the window of every reader."""


class PagePool:
    """Numbers the pages of one group of the cache.

    A page can have several owners, that share a prefix. One without owners whose content is known
    by a key stays until the room is needed; the one that was left longest goes first. The lowest
    free page is taken first, so that pages in use lie together.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages))
        self._owners = [0] * pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._left: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        return len(self._free) + len(self._left)

    def take(self) -> int:
        """A page for one new owner; there must be one available."""
        if self._free:
            page = heapq.heappop(self._free)
        else:
            page, _ = self._left.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._owners[page] = 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """One owner lets go of each of ``pages``."""
        for page in pages:
            if page == DROPPED:
                continue
            self._owners[page] -= 1
            assert self._owners[page] >= 0, "a page was released twice"
            if self._owners[page] == 0:
                if page in self._key_of:
                    self._left[page] = None
                else:
                    heapq.heappush(self._free, page)

    def find(self, key: bytes) -> int | None:
        """The page with this content, if there is one."""
        return self._page_of.get(key)

    def share(self, page: int) -> None:
        """One more owner of a page that :meth:`find` has found."""
        self._owners[page] += 1
        self._left.pop(page, None)

    def name(self, page: int, key: bytes) -> None:
        """What a full page contains, so that others find it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key


def page_keys(mode: str, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """A key for every full page of ``tokens``: the way its keys and values are made, and all tokens
    up to its end."""
    keys: list[bytes] = []
    before = mode.encode()
    for start in range(0, len(tokens) - page_size + 1, page_size):
        content = ",".join(map(str, tokens[start : start + page_size]))
        before = hashlib.sha256(before + b"|" + content.encode()).digest()
        keys.append(before)
    return keys
