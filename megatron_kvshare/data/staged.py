"""The training samples of a run whose blend changes on its way.

Sample ``i`` of a stage that begins with sample ``n`` of the run is sample ``i - n`` of its blend:
a stage reads what a run of that blend alone would read from its own beginning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from megatron_kvshare.data.stream import SampleStream


class Place(NamedTuple):
    """Where a sample comes from: stage and source from 0, and its number in the source."""

    stage: int
    source: int
    number: int


class StagedStream(Dataset[Tensor]):
    """Sample ``i`` of the run, for every ``i`` >= 0.

    Args:
        streams: the blend of every stage.
        firsts: the run's sample that each of them begins with; rising, from 0.
    """

    def __init__(self, streams: Sequence[SampleStream], firsts: Sequence[int] = (0,)) -> None:
        assert len(streams) == len(firsts) and firsts[0] == 0
        self.streams = list(streams)
        self._firsts = list(firsts)

    def __getitem__(self, index: int) -> Tensor:
        """Ids of sample ``index``, ``[s + 1]`` int64."""
        stage = self.stage_of(index)
        return self.streams[stage][index - self._firsts[stage]]

    def stage_of(self, index: int) -> int:
        """The stage of a sample, from 0."""
        return bisect_right(self._firsts, index) - 1

    def locate(self, index: int) -> Place:
        """Where sample ``index`` comes from."""
        stage = self.stage_of(index)
        return Place(stage, *self.streams[stage].locate(index - self._firsts[stage]))

    def counts(self, first: int, end: int) -> Iterator[tuple[int, list[int]]]:
        """By stage how many of the samples ``[first, end)`` are of each of its sources."""
        for stage, begin in enumerate(self._firsts):
            later = self._firsts[stage + 1] if stage + 1 < len(self._firsts) else end
            start, stop = max(first, begin), min(end, later)
            if start < stop:
                yield stage, self.streams[stage].counts(start - begin, stop - begin)
