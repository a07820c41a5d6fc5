"""The keys and values that a layer may read: what is known of them, and how attention takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self, TypeVar

from megatron_kvshare.kernels.paged_attention import PagedKV
from megatron_kvshare.model.context import VisitContext
from megatron_kvshare.model.kv import KV, KVBlocks, KVState
from megatron_kvshare.model.visibility import Visibility


class Readable(NamedTuple):
    """Keys and values as attention takes them, and which of them a query sees."""

    kv: KV | KVBlocks | PagedKV
    visible: Visibility


class View(Protocol):
    """What a layer needs of the keys and values around it, and where it leaves its own."""

    @property
    def context(self) -> VisitContext:
        """Of the tokens that the layer runs for."""
        ...

    def with_own(self, producer: int, own: KV) -> Self:
        """After ``producer`` has made its keys and values of the context's tokens."""
        ...

    def readable(self, layer: int) -> Readable:
        """What the attention of ``layer`` reads."""
        ...


AnyView = TypeVar("AnyView", bound=View)


@dataclass(frozen=True)
class KVView:
    """What is known of every producer's keys and values when a layer runs for the tokens of
    ``context``.

    A layer is given a view and returns the next one, which has what it has made: new keys and
    values are merged here and nowhere else. A view never changes, so a recomputed layer finds what
    it found at first. ``_arranged`` only remembers what :meth:`readable` has arranged, ``_joined``
    the keys and values in group order, which all readers of one kernel share.
    """

    known: KVState
    context: VisitContext
    _arranged: dict[tuple[int, bool, bool], Readable] = field(default_factory=dict)
    _joined: dict[int, KV] = field(default_factory=dict)

    @classmethod
    def of_all_tokens(cls, kv: Mapping[int, KV], context: VisitContext) -> KVView:
        return cls({producer: KVBlocks((whole,)) for producer, whole in kv.items()}, context)

    def blocks(self, producer: int) -> KVBlocks:
        return self.known.get(producer, KVBlocks.unknown(self.context.stride))

    def whole(self) -> dict[int, KV]:
        """All that is known, of all tokens in their order."""
        return {producer: blocks.whole() for producer, blocks in self.known.items()}

    def with_own(self, producer: int, own: KV) -> KVView:
        """After ``producer`` has made its keys and values of the context's tokens."""
        return self.reading(producer, self.blocks(producer).with_block(self.context.offset, own))

    def reading(self, producer: int, blocks: KVBlocks) -> KVView:
        """With ``blocks`` in place of what is known of ``producer``."""
        others = {key: kept for key, kept in self._arranged.items() if key[0] != producer}
        joined = {key: kept for key, kept in self._joined.items() if key != producer}
        return KVView({**self.known, producer: blocks}, self.context, others, joined)

    def can_read(self, producer: int) -> bool:
        """Whether there is anything yet of what ``producer`` makes."""
        return bool(self.blocks(producer).known) or self.context.past is not None

    def without(self, producer: int) -> KVView:
        """Without the keys and values of ``producer``, which no other layer reads."""
        known = {other: blocks for other, blocks in self.known.items() if other != producer}
        return KVView(known, self.context, self._arranged, self._joined)

    def readable(self, layer: int) -> Readable:
        """What the attention of ``layer`` reads; arranged once for all consumers alike."""
        sharing = self.context.spec.map
        producer = sharing.sources[layer]
        if producer == layer:
            return self._arrange(layer, producer)
        key = (producer, sharing.is_upward(layer), sharing.windowed[layer])
        if key not in self._arranged:
            self._arranged[key] = self._arrange(layer, producer)
        return self._arranged[key]

    def _arrange(self, layer: int, producer: int) -> Readable:
        """As blocks where no mask is needed, else as one tensor."""
        blocks = self.blocks(producer)
        if self.context.past is not None:
            before = self.context.past.kv[producer]
            visible = self.context.visibility(layer, len(blocks.known))
            return Readable(KVBlocks((before, *blocks.known)).concatenated(), visible)
        visible = self.context.visibility(layer, len(blocks.known))
        if visible.block_mask is not None:
            if producer not in self._joined:
                self._joined[producer] = blocks.concatenated()
            return Readable(self._joined[producer], visible)
        as_blocks = self.context.stride > 1 and visible.mask is None
        return Readable(blocks if as_blocks else blocks.concatenated(), visible)
