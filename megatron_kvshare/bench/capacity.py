"""How many sequences a memory budget holds (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from megatron_kvshare.serving.layout import CacheLayout


class Lengths(NamedTuple):
    """Tokens of a prompt, and how many are generated after it."""

    prompt: int
    generated: int

    @property
    def total(self) -> int:
        return self.prompt + self.generated

    def __str__(self) -> str:
        return f"{self.prompt}+{self.generated}"


def batch_pages(layout: CacheLayout, batch: int, lengths: Lengths) -> tuple[int, ...]:
    """Pages of each group of the cache with which the engine runs ``batch`` sequences to their end
    at the same time: what they hold then, what one more chunk holds beside its window, and the
    page that it wants to see free when it takes in the last prompt."""
    pages = []
    for group in layout.groups:
        each = group.most_pages(lengths.total, layout.page_size)
        peak = group.peak_pages(lengths.total, layout.page_size)
        of_prompt = group.most_pages(lengths.prompt, layout.page_size)
        entering = batch * of_prompt + (1 if batch > 1 else 0)
        pages.append(max((batch - 1) * each + peak, entering))
    return tuple(pages)


def batch_bytes(layout: CacheLayout, batch: int, lengths: Lengths) -> int:
    """What these pages take."""
    return layout.pages_bytes(batch_pages(layout, batch, lengths))


def largest_batch(layout: CacheLayout, budget: int, lengths: Lengths) -> int:
    """The most sequences whose cache takes at most ``budget`` bytes; 0 where not one fits."""
    each = batch_bytes(layout, 3, lengths) - batch_bytes(layout, 2, lengths)
    most = budget // each + 1
    return largest(lambda batch: batch_bytes(layout, batch, lengths) <= budget, most)


def largest(fits: Callable[[int], bool], most: int, share: float = 0.0) -> int:
    """The largest number up to ``most`` that ``fits``, where all below one that fits do too; 0 if
    none does. The answer is thought to be near ``most``; the search ends when what is left to find
    out is a ``share`` of it."""
    if most < 1 or fits(most):
        return max(0, most)
    low, high, step = 0, most, max(1, int(share * most))
    while low < high - step and not fits(high - step):
        high, step = high - step, 2 * step
    low = max(low, high - step)
    while high - low > max(1, share * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
