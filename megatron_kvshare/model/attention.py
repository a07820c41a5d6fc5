"""Self-attention with own or another layer's keys and values. Source: arXiv 2410.14442."""

from __future__ import annotations

import torch
from torch import nn

from megatron_kvshare.kernels.heads import Heads, split_heads
from megatron_kvshare.megatron_api.layers import TransformerConfig, gather_last_dim
from megatron_kvshare.model.context import VisitContext
from megatron_kvshare.model.core_attention import attend
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.kv import KV
from megatron_kvshare.model.kv_view import AnyView, View
from megatron_kvshare.model.modules import LayerSpec
from megatron_kvshare.model.recompute import recomputed


class SharedKVAttention(nn.Module):
    """Layer ``layer``'s attention; a consumer has no key and value weights.

    ``linear_qkv`` holds this rank's rows ``[queries | keys | values]``, a consumer's the queries
    only. Keys are rotated once, by their producer.
    """

    def __init__(
        self,
        layer: int,
        is_producer: bool,
        heads: HeadLayout,
        spec: LayerSpec,
        config: TransformerConfig,
        recompute_core: bool,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.is_producer = is_producer
        self.heads = heads
        rows = heads.query_width + (2 * heads.kv_width if is_producer else 0)
        self.linear_qkv = spec.column(config.hidden_size, rows, config)
        self.linear_proj = spec.row(heads.query_width, config.hidden_size, config)
        self.recompute_core = recompute_core

    def forward(self, x: torch.Tensor, view: AnyView) -> tuple[torch.Tensor, AnyView]:
        """``[s, b, h]`` and the keys and values known so far -> ``[s, b, h]``, and the same with
        those that this layer makes."""
        query, own = self._heads_of(self.linear_qkv(x), view.context)
        if own is not None:
            view = view.with_own(self.layer, own)
        attended = recomputed(attend, self.recompute_core)(query, *view.readable(self.layer))
        return self.linear_proj(attended), view

    def read_own(self, x: torch.Tensor, view: View) -> torch.Tensor:
        """A producer whose keys and values are there already: queries and attention alone."""
        projected = self.linear_qkv(x, slice(0, self.heads.local_query_width))
        query = self._query_of(projected, view.context)
        attended = recomputed(attend, self.recompute_core)(query, *view.readable(self.layer))
        return self.linear_proj(attended)

    def key_values(self, x: torch.Tensor, context: VisitContext) -> KV:
        """The producer's keys and values alone, from ``[s, b, h]``."""
        rows = slice(self.heads.local_query_width, None)
        return self._kv_of(self.linear_qkv(x, rows), context)

    def _heads_of(
        self, projected: torch.Tensor, context: VisitContext
    ) -> tuple[torch.Tensor, KV | None]:
        """Rotated query heads and, for a producer, the KV heads they read."""
        heads, queries = self.heads, Heads(self.heads.local_query_heads, rotated=True)
        if self.is_producer and not heads.kv_heads_are_split:
            parts = (queries, *heads.kv_parts)
            query, key, value = self._split(projected, parts, context)
            return query, KV(key, value)
        own = None
        if self.is_producer:
            widths = (heads.local_query_width, 2 * heads.local_kv_width)
            projected, key_values = projected.split(widths, dim=-1)
            own = self._kv_of(key_values, context)
        return self._query_of(projected, context), own

    def _query_of(self, projected: torch.Tensor, context: VisitContext) -> torch.Tensor:
        queries = (Heads(self.heads.local_query_heads, rotated=True),)
        return self._split(projected, queries, context)[0]

    def _kv_of(self, key_values: torch.Tensor, context: VisitContext) -> KV:
        """This rank's key and value columns -> the KV heads its queries read, keys rotated."""
        heads = self.heads
        if heads.kv_heads_are_split:
            key_values = whole_head(key_values, heads)
        return KV(*self._split(key_values, heads.kv_parts, context))

    def _split(
        self, projected: torch.Tensor, parts: tuple[Heads, ...], context: VisitContext
    ) -> tuple[torch.Tensor, ...]:
        compile_wanted = context.spec.model.compile
        return split_heads(projected, self.heads.head_dim, parts, context.rotary, compile_wanted)


def whole_head(key_values: torch.Tensor, heads: HeadLayout) -> torch.Tensor:
    """``[s, b, 2 * part]``, this rank's columns of all keys and of all values -> ``[s, b, 2 * d]``,
    the head that its queries read, where ranks share heads.

    Several ranks read the same one: the gather's backward sums the gradients of all of them.
    """
    everyone = gather_last_dim(key_values).unflatten(-1, (heads.tp_size, 2, -1))
    mine = heads.kv_head_of_rank * heads.head_dim
    whole: torch.Tensor = everyone.transpose(2, 3).flatten(3)[..., mine : mine + heads.head_dim]
    return whole.flatten(2)
