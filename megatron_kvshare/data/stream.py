"""An endless, randomly accessible stream of samples over blended sources.

Which tokens sample ``i`` holds depends on the data, the split, the sequence length and the seed
only: not on the length of the run, the number of processes or where a run was resumed. So a run may
be extended, and continues from a single number, the samples consumed so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Protocol

import numpy
from torch import Tensor
from torch.utils.data import Dataset

from megatron_kvshare.megatron_api.datasets import blend_pattern

_PATTERN_PICKS = 1 << 20


class Samples(Protocol):
    """A fixed number of samples: the ids that tokens and labels are cut from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class SampleStream(Dataset[Tensor]):
    """Sample ``i`` of the blend, for every ``i`` >= 0.

    The blend follows megatron-core's order for the first million picks and repeats it after that,
    so that the source of any sample is known without counting through the ones before. Each source
    runs through its samples once per round; later rounds visit them in another order.

    Args:
        sources: one dataset of samples per source.
        weights: share of each source; any positive numbers.
        seed: decides the order of later rounds.
    """

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float], seed: int) -> None:
        self.sources = list(sources)
        self.seed = seed
        if len(sources) > 1:
            self._pick_source, self._pick_earlier = blend_pattern(list(weights), _PATTERN_PICKS)
            self._picks = numpy.bincount(self._pick_source, minlength=len(sources)).tolist()

    def __getitem__(self, index: int) -> Tensor:
        """Ids of sample ``index``, ``[s + 1]`` int64."""
        source, position = self.locate(index)
        return self.sources[source][position]

    def counts(self, first: int, end: int) -> list[int]:
        """How many of the samples ``[first, end)`` are of each source."""
        if len(self.sources) == 1:
            return [end - first]
        (turns, start), (last_turns, stop) = (divmod(at, _PATTERN_PICKS) for at in (first, end))
        between = self._pick_source[min(start, stop) : max(start, stop)]
        rest = numpy.bincount(between, minlength=len(self.sources)).tolist()
        sign = 1 if start <= stop else -1
        return [
            (last_turns - turns) * picks + sign * more
            for picks, more in zip(self._picks, rest, strict=True)
        ]

    def locate(self, index: int) -> tuple[int, int]:
        """Source and the number of the sample in it."""
        source, nth = 0, index
        if len(self.sources) > 1:
            pattern, pick = divmod(index, _PATTERN_PICKS)
            source = int(self._pick_source[pick])
            nth = pattern * self._picks[source] + int(self._pick_earlier[pick])
        size = len(self.sources[source])
        turn, place = divmod(nth, size)
        start, stride = _reorder(size, self.seed, turn)
        return source, (start + stride * place) % size


@lru_cache(maxsize=64)
def _reorder(size: int, seed: int, turn: int) -> tuple[int, int]:
    """Start and stride of a walk that visits ``size`` places once each; the identity in round 0.

    The samples are shuffled already, so walking them with a random stride is a fresh order without
    the memory of a permutation.
    """
    if turn == 0 or size == 1:
        return 0, 1
    random = numpy.random.default_rng([seed, turn])
    start, stride = (int(number) for number in random.integers(1, size, size=2))
    while gcd(stride, size) != 1:
        stride = stride % size + 1
    return start, stride
