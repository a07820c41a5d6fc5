"""What the layers of one forward share: positions and visibility of all tokens or a subset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from megatron_kvshare.kernels.choice import causal_kernel, has_subset_kernel
from megatron_kvshare.kernels.subset_attention import subset_mask
from megatron_kvshare.model.kv import KV
from megatron_kvshare.model.rotary import Rotary, rotary
from megatron_kvshare.model.visibility import SequenceLayout, Visibility
from megatron_kvshare.sharing.plan import subset_length
from megatron_kvshare.spec.model_spec import ModelSpec

BLOCKWISE_FROM = 512
"""Queries from which one causal kernel per pair of blocks beats one kernel with a mask (measured on
the CPU: at 64 queries it takes 1.3 times as long, at 512 three quarters)."""


_Seen = dict[tuple[bool, bool, int], Visibility]


class Past(NamedTuple):
    """The ``tokens`` before those of a forward, whose keys and values are final: of every
    producer."""

    tokens: int
    kv: Mapping[int, KV]


@dataclass(frozen=True)
class VisitContext:
    """For the tokens ``offset::stride`` of every sequence: rotary tables, and what they may see.

    ``layout`` is the whole sequences'. ``blockwise``: a subset reads without a full mask, as
    ``one_kernel`` or by one for each block of keys. ``past``: what all of them see besides; subsets
    go by the position within ``layout`` all the same. ``_seen`` only remembers what
    :meth:`visibility` has built.
    """

    rotary: Rotary
    spec: ModelSpec
    layout: SequenceLayout
    blockwise: bool
    one_kernel: bool
    stride: int = 1
    offset: int = 0
    past: Past | None = None
    _seen: _Seen = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return subset_length(self.layout.length, self.stride, self.offset)

    def visibility(self, layer: int, known: int = 1) -> Visibility:
        """What ``layer`` may see of the first ``known`` blocks of keys."""
        strict, windowed = self.spec.map.is_upward(layer), self.spec.map.windowed[layer]
        key = (strict, windowed, known)
        if key not in self._seen:
            self._seen[key] = self._visibility(strict, windowed, known)
        return self._seen[key]

    def _visibility(self, strict: bool, windowed: bool, known: int) -> Visibility:
        window = self.spec.window_size if windowed else None
        past = 0 if self.past is None else self.past.tokens
        if self.stride == 1 and not past:
            return self.layout.visibility(strict, window)
        full = window is None or window >= self.layout.length
        if self.blockwise and full and self.layout.document_ids is None and not past:
            if not self.one_kernel:
                return Visibility(strict, offset=self.offset)
            length, device = self.layout.length, self.layout.device
            mask = subset_mask(length, self.stride, self.offset, strict, known, device)
            return Visibility(strict, block_mask=mask)
        # The keys are those of the past, then the known blocks.
        before = torch.arange(past, device=self.layout.device)
        subset = replace(
            self.layout,
            length=past + self.layout.length,
            query_positions=past + self._positions(self.offset),
            key_positions=torch.cat([before, *(past + self._positions(n) for n in range(known))]),
            first_token=self.offset == 0 and not past,
        )
        return replace(subset.visibility(strict, window), grouped=not past)

    def _positions(self, offset: int) -> torch.Tensor:
        return torch.arange(offset, self.layout.length, self.stride, device=self.layout.device)


@dataclass(frozen=True)
class SequenceContexts:
    """The contexts of one forward, made when a plan asks for them.

    ``has_block_kernel``: whether pairs of blocks can do without a mask on this device, in this
    type and head size.
    """

    whole: VisitContext
    has_block_kernel: bool
    _visits: dict[tuple[int, int], VisitContext] = field(default_factory=dict)

    def visit(self, stride: int, offset: int) -> VisitContext:
        if stride == 1:
            return self.whole
        if (stride, offset) not in self._visits:
            self._visits[stride, offset] = self._subset(stride, offset)
        return self._visits[stride, offset]

    def _subset(self, stride: int, offset: int) -> VisitContext:
        layout = self.whole.layout
        queries = subset_length(layout.length, stride, offset)
        tables = (table[..., offset::stride, :].contiguous() for table in self.whole.rotary)
        return replace(
            self.whole,
            rotary=Rotary(*tables),
            blockwise=queries >= BLOCKWISE_FROM and self.has_block_kernel,
            stride=stride,
            offset=offset,
            _seen={},
        )


def subset_kernel(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the attention of a token subset is one kernel, where it has queries enough."""
    wanted = spec.model.compile and spec.model.flex_attention
    return has_subset_kernel(device, dtype, spec.model.head_dim, compile_wanted=wanted)


def sequence_contexts(
    spec: ModelSpec,
    layout: SequenceLayout,
    position_ids: torch.Tensor | None,
    past: Past | None = None,
) -> SequenceContexts:
    """``position_ids`` ``[b, s]`` when documents restart their positions, else None for 0..s-1, or
    for what follows the ``past``."""
    positions = position_ids
    if positions is None:
        first = 0 if past is None else past.tokens
        positions = torch.arange(first, first + layout.length, device=layout.device)
    tables = rotary(positions, spec.model, layout.dtype)
    kind = (layout.device, layout.dtype, spec.model.head_dim)
    one_kernel = subset_kernel(spec, *kind[:2])
    whole = VisitContext(tables, spec, layout, blockwise=False, one_kernel=one_kernel, past=past)
    kernel = causal_kernel(*kind)
    return SequenceContexts(whole, has_block_kernel=kernel is not None)
