"""Which pipeline stage holds which layers, and what has to cross the cuts (no torch).

Keys and values travel with the hidden states, packed into one tensor, and only as far as the last
stage that reads them. A cyclic group inside one stage iterates there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.stages.layout import Layout


@dataclass(frozen=True)
class Stage:
    """Layers ``first..stop - 1``, as chunk ``chunk`` of the ``chunks`` of pipeline rank ``rank``.

    ``receives``: producers below whose KV arrives, for this stage or one above; ``sends``: those
    whose KV leaves, its own and what it forwards.
    """

    number: int
    rank: int
    chunk: int
    chunks: int
    first: int
    stop: int
    embeds: bool
    predicts: bool
    receives: tuple[int, ...] = ()
    sends: tuple[int, ...] = ()

    @property
    def layers(self) -> range:
        return range(self.first, self.stop)

    @property
    def forwards(self) -> tuple[int, ...]:
        """Producers whose KV only passes through."""
        return tuple(layer for layer in self.sends if layer not in self.layers)


@dataclass(frozen=True)
class Placement:
    """A sharing map cut into stages on ``ranks`` pipeline ranks."""

    map: SharingMap
    layout: Layout
    ranks: int = 1

    @classmethod
    def whole(cls, map: SharingMap) -> Placement:
        """All layers on one rank."""
        return cls(map, (map.num_layers,))

    def __post_init__(self) -> None:
        assert sum(self.layout) == self.map.num_layers, "a layout must hold every layer"
        assert len(self.layout) % self.ranks == 0, "every rank has equally many stages"

    @property
    def chunks(self) -> int:
        """Stages of each rank."""
        return len(self.layout) // self.ranks

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        count, first, stages = len(self.layout), 0, []
        for number, layers in enumerate(self.layout):
            stop = first + layers
            stage = Stage(
                number=number,
                rank=number % self.ranks,
                chunk=number // self.ranks,
                chunks=self.chunks,
                first=first,
                stop=stop,
                embeds=number == 0,
                predicts=number == count - 1,
                receives=self.crossing(first),
                sends=self.crossing(stop),
            )
            stages.append(stage)
            first = stop
        return tuple(stages)

    def stages_of(self, rank: int) -> tuple[Stage, ...]:
        """The chunks of a pipeline rank, in the order of layers."""
        return self.stages[rank :: self.ranks]

    def stage_of(self, layer: int) -> Stage:
        return next(stage for stage in self.stages if layer in stage.layers)

    def crossing(self, cut: int) -> tuple[int, ...]:
        """Producers below layer ``cut`` that a layer from ``cut`` on reads."""
        read = set(self.map.sources[cut:])
        return tuple(layer for layer in self.map.producers if layer < cut and layer in read)

    @cached_property
    def spanning_groups(self) -> tuple[tuple[int, int], ...]:
        """Cyclic groups ``(first, last)`` that do not lie inside one stage."""
        return tuple(
            (first, last)
            for first, last in self.map.cyclic_groups
            if self.stage_of(first) != self.stage_of(last)
        )

    def upward_reads_across_stages(self) -> Iterator[tuple[int, int]]:
        """Layers whose keys and values are made in a later stage, and the layer that makes them."""
        for layer, source in enumerate(self.map.sources):
            if self.map.is_upward(layer) and self.stage_of(layer) != self.stage_of(source):
                yield layer, source


@dataclass(frozen=True)
class PayloadShape:
    """What one microbatch looks like on one tensor-parallel rank.

    ``sequence_ranks``: over how many ranks hidden states are split along the sequence. KV are not
    split: each rank holds its heads, or where ranks share a head its part of the head's width.
    """

    model: ModelShape
    sequences: int
    bytes_per_element: int
    tensor_ranks: int = 1
    sequence_ranks: int = 1

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    @property
    def kv_width(self) -> int:
        return self.model.kv_width

    @property
    def seq_length(self) -> int:
        return self.model.seq_length

    @property
    def local_kv_width(self) -> int:
        """Keys (or values) that one rank sends: its heads, or its part of a head."""
        return self.kv_width // self.tensor_ranks

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        micro_batch_size: int,
        bytes_per_element: int,
        tensor_ranks: int = 1,
        sequence_parallel: bool = False,
    ) -> PayloadShape:
        return cls(
            model=shape,
            sequences=micro_batch_size,
            bytes_per_element=bytes_per_element,
            tensor_ranks=tensor_ranks,
            sequence_ranks=tensor_ranks if sequence_parallel else 1,
        )

    @property
    def rows(self) -> int:
        """Rows of a payload: the rank's part of the sequence."""
        return self.seq_length // self.sequence_ranks

    def width(self, producers: int) -> int:
        """Elements per row with the KV of so many producers: those of other tokens lie beside."""
        kv = 2 * self.local_kv_width * self.sequence_ranks
        return self.hidden_size + producers * kv

    def bytes(self, width: int) -> int:
        return self.rows * self.sequences * width * self.bytes_per_element


def boundary_widths(placement: Placement, shape: PayloadShape) -> tuple[int, ...]:
    """Elements per row at the cut above every stage but the last, padding included.

    With virtual stages all payloads are as wide as the widest: megatron-core's interleaved schedule
    knows one size. (With its exchange of shapes it deadlocks at as many microbatches as ranks, and
    two ranks mix up the directions.)
    """
    widths = [shape.width(len(stage.sends)) for stage in placement.stages[:-1]]
    if placement.chunks > 1:
        widths = [max(widths)] * len(widths)
    return tuple(widths)
