"""A Llama-shaped decoder whose layers share keys and values (arXiv 2410.14442).

This file travels with every exported model and stands alone: torch, transformers and
``configuration_kvshare.py`` beside it. Shapes: b batch, s new tokens, t all tokens a query may
read, n query heads, g key-value heads, d width of a head, h width of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_kvshare import KVShareConfig

_EXACT_STRIDE = 8
_CONVERGED = (8, 1, 1)  # stride, sweeps before the last, last
_SETTLED = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative; about the rounding of one sweep
_SETTLED_LOW_PRECISION = 4e-3


class KV(NamedTuple):
    """Rotated keys and values of one layer, ``[b, g, t, d]``."""

    key: torch.Tensor
    value: torch.Tensor


class Visible(NamedTuple):
    """Which keys attention sees, and the function that computes it.

    ``mask``: ``[b or 1, 1, s, t]``, True = seen; None = every earlier key and the token's own.
    ``blind``: ``[b or 1, s]``, queries that see nothing and attend to nothing. ``strict``,
    ``window``, ``padding`` ``[b, t]`` and ``document`` ``[b, t]`` (the number of each token's own)
    say the same to attention functions that take no mask. ``by``: the name of the function;
    ``beside``: what a server hands it through the model.
    """

    by: str
    mask: Any = None
    blind: torch.Tensor | None = None
    strict: bool = False
    window: int | None = None
    padding: torch.Tensor | None = None
    document: torch.Tensor | None = None
    beside: Mapping[str, Any] = MappingProxyType({})


class Rows(NamedTuple):
    """The new tokens ``offset::stride``, which run together; rotary tables ``[b, 1, s, d]``."""

    offset: int
    stride: int
    cos: torch.Tensor
    sin: torch.Tensor


class Documents(NamedTuple):
    """Documents packed into rows, laid out so that each begins a multiple of the stride after the
    first: its token subsets are those of the document alone. What fills up a document repeats its
    last token, after all that is real. ``order`` and ``number`` (of the document): ``[b, laid out
    tokens]``; ``place`` (of every given token) and ``position`` (in its document): ``[b, s]``."""

    order: torch.Tensor
    number: torch.Tensor
    place: torch.Tensor
    position: torch.Tensor
    longest: int

    @classmethod
    def of(cls, starts: torch.Tensor, stride: int) -> Documents:
        """Of ``starts`` ``[b, s]``, True where a document begins."""
        given = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
        position = given - torch.where(starts, given, 0).cummax(-1).values
        fillers = torch.where(starts, -F.pad(position + 1, (1, -1)) % stride, 0)
        place = given + fillers.cumsum(-1)
        order = starts.new_zeros((len(starts), int(place.max()) + 1), dtype=torch.long)
        order = order.scatter(1, place, given).cummax(-1).values
        number = starts.long().cumsum(-1).gather(1, order)
        return cls(order, number, place, position, int(position.max()) + 1)


class NewTokens:
    """The tokens of one forward: their rotary tables, and what they may see of each other and of
    ``past`` tokens in the cache. Made anew for every forward and passed along."""

    def __init__(
        self,
        model: KVShareModel,
        embeddings: torch.Tensor,
        past: int,
        real: torch.Tensor | None,
        positions: torch.Tensor | None,
        documents: Documents | None,
        attention: str,
        served: Mapping[str, Any],
        in_order: bool,
    ) -> None:
        self.config = model.config
        self.attention = attention
        self.served = served
        self.length = self.longest = embeddings.shape[1]
        self.past = past
        self.device = embeddings.device
        self.padding: torch.Tensor | None = None
        self.order: torch.Tensor | None = None
        self.place: torch.Tensor | None = None
        self.document: torch.Tensor | None = None
        if positions is None and documents is not None:
            positions = documents.position
        elif positions is None:
            positions = torch.arange(past, past + self.length, device=self.device)[None]
            if real is not None:  # a gap between real tokens counts, as in transformers
                positions = (positions - first_real(real)).where(real[:, past:], 0)
        if documents is not None:
            self.document, self.longest = documents.number, documents.longest
            self.order, self.place = documents.order, documents.place
            self.length = self.order.shape[1]
        elif real is not None and (past or in_order):
            self.padding = real
        elif real is not None:
            # Padding on the left goes last: it is then where no real token looks, and subsets of
            # tokens are those of the sequence without it.
            given = torch.arange(self.length, device=self.device)
            self.order = (given + first_real(real)) % self.length
            self.place = (given - first_real(real)) % self.length
            moved = real.gather(1, self.order)
            self.padding = moved if bool((moved[:, 1:] & ~moved[:, :-1]).any()) else None
        if self.order is not None:
            positions = positions.expand(len(self.order), -1).gather(1, self.order)
        self.cos, self.sin = model.rotary.tables(positions, embeddings.dtype)
        self._seen: dict[tuple[Any, ...], Visible | None] = {}

    def real_first(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Tokens, along ``dim``, in the order they are computed in."""
        return x if self.order is None else _take(x, self.order, dim)

    def as_given(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Tokens, along ``dim``, in the order they came in."""
        return x if self.place is None else _take(x, self.place, dim)

    def rows(self, offset: int = 0, stride: int = 1) -> Rows:
        subset = (..., slice(offset, None, stride), slice(None))
        return Rows(offset, stride, self.cos[subset], self.sin[subset])

    def visible(
        self, layer: int, rows: Rows, keys: int, known: int | None = None
    ) -> Visible | None:
        """What ``layer`` sees of ``keys`` keys; of the new tokens only the first ``known`` subsets
        have any. None: not a single query sees a key.
        """
        if self.served:
            return Visible(self.attention, beside=self.served)
        strict = self.config.kv_source_layers[layer] > layer
        windowed = layer in self.config.kv_windowed_layers
        window = self.config.kv_window_size if windowed else None
        name = (rows.offset, rows.stride, strict, window, keys, known)
        if name not in self._seen:
            self._seen[name] = self._visible(rows, strict, window, keys, known)
        return self._seen[name]

    def _visible(
        self, rows: Rows, strict: bool, window: int | None, keys: int, known: int | None
    ) -> Visible | None:
        query = torch.arange(rows.offset, self.length, rows.stride, device=self.device) + self.past
        key = torch.arange(keys, device=self.device)
        ago = query[:, None] - key[None, :]
        seen = ago >= (1 if strict else 0)
        if window is not None:
            seen = seen & (ago < window)
        if known is not None:
            seen = seen & ((key < self.past) | ((key - self.past) % rows.stride < known))
        seen = seen[None]
        if self.document is not None:
            own = self.document[:, rows.offset :: rows.stride]
            seen = seen & (own[:, :, None] == self.document[:, None, :])
        padding = None if self.padding is None else self.padding[:, :keys]
        if padding is not None:
            padding = F.pad(padding, (0, keys - padding.shape[1]))
            seen = seen & padding[:, None, :]
        by = self.attention
        if not self._needs_mask(seen, rows, strict):
            return Visible(by, window=window)
        blind = ~seen.any(-1)
        if bool(blind.all()):
            return None
        mask = (seen | blind[..., None])[:, None]
        mask = block_mask(mask) if by == "flex_attention" else mask
        blind = blind if bool(blind.any()) else None
        return Visible(by, mask, blind, strict, window, padding, self.document)

    def _needs_mask(self, seen: torch.Tensor, rows: Rows, strict: bool) -> bool:
        """Without one, a single query sees all keys, and as many queries as keys see causally (by
        flex attention every query sees all)."""
        if seen.shape[1] == 1 or self.attention == "flex_attention":
            return not bool(seen.all())
        plain = rows.stride == 1 and not strict and seen.shape[1] == seen.shape[2]
        return not (plain and bool(seen[:, -1].all()))


def block_mask(mask: torch.Tensor) -> Any:
    """The same as flex attention takes it; importing that takes seconds."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return mask[b if rows > 1 else 0, 0, q, k]

    rows, _, queries, keys = mask.shape
    return create_block_mask(seen, rows, None, queries, keys, device=mask.device)


def first_real(real: torch.Tensor) -> torch.Tensor:
    """``[b, 1]``, how many tokens of padding a row of ``real`` ``[b, s]`` begins with."""
    return real.long().argmax(-1, keepdim=True)


def token_stride(config: KVShareConfig, training: bool) -> int:
    """How many subsets of tokens a sweep visits one after another."""
    if not config.cyclic_groups:
        return 1
    strides = {"trained": config.iter_stride, "converged": _CONVERGED[0], "exact": _EXACT_STRIDE}
    return strides["trained" if training else config.kv_prefill]


def _take(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    """``x`` with the tokens along ``dim`` as ``order`` ``[b, s]`` says."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.take_along_dim(order.view(shape), dim)


def document_ends(
    shape: torch.Size,
    position_ids: torch.Tensor | None,
    real: torch.Tensor | None,
    packing: dict[str, Any],
    gaps: bool,
) -> dict[str, torch.Tensor]:
    """What each argument says of the ends of documents: ``[b, s - 1]``, True where one is.

    As in transformers, a document ends where position ids do not go up by one; beside a mask or a
    cache (``gaps``) a step forward is no end.
    """
    ends = {}
    if position_ids is not None:
        # Padding is below all positions: between real tokens only are there steps.
        positions = position_ids if real is None else position_ids.where(real[:, -shape[1] :], -1)
        highest = positions.cummax(-1).values
        back = bool(((positions[:, 1:] >= 0) & (positions[:, 1:] <= highest[:, :-1])).any())
        if back or not gaps:
            ends["position_ids"] = position_ids.diff(dim=-1) != 1
    if packing["seq_idx"] is not None:
        ends["seq_idx"] = packing["seq_idx"].expand(shape).diff(dim=-1) != 0
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if packing[name] is not None:
            ends[name] = _ends_of(name, packing[name].long().flatten(), shape)
    return ends


def _ends_of(name: str, bounds: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``[b, s - 1]``, True where a document ends, of cumulative lengths over all rows."""
    if bool((bounds.diff() < 0).any()) or [int(bounds[0]), int(bounds[-1])] != [0, shape.numel()]:
        raise ValueError(f"{name} must rise from 0 to the number of tokens, {shape.numel()}")
    starts = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=bounds.device)
    return starts.index_fill(0, bounds, True)[:-1].view(shape)[:, 1:]


class Rotary:
    """The rotary embedding: tables of frequencies that are computed in every forward."""

    def __init__(self, config: KVShareConfig) -> None:
        self.kind = config.rope_parameters["rope_type"]
        self.theta = config.rope_parameters["rope_theta"]
        self.width = config.head_dim
        self.llama = config.rotary_llama()

    def tables(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, ``[b, 1, s, d]``."""
        frequency, factor = self._frequency(positions)
        angles = positions[..., None].float() * frequency
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def _frequency(self, positions: torch.Tensor) -> tuple[torch.Tensor, float]:
        if self.kind == "default":  # not among the functions since transformers 5
            exponent = torch.arange(0, self.width, 2, device=positions.device).float() / self.width
            return 1.0 / (self.theta**exponent), 1.0
        length = int(positions.max()) + 1 if self.kind in ("dynamic", "longrope") else None
        return ROPE_INIT_FUNCTIONS[self.kind](self.llama, positions.device, seq_len=length)


def rotate(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * rows.cos + torch.cat((-right, left), dim=-1) * rows.sin


class KVShareRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class KVShareMLP(nn.Module):
    def __init__(self, config: KVShareConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: Visible,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with all weights at hand; returns ``[b, s, n, d]`` and the weights."""
    attention_mask = visible.mask
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * module.scaling
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], device=key.device).tril().bool()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(query.dtype)
    if visible.blind is not None:
        weights = weights.masked_fill(visible.blind[:, None, :, None], 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class KVShareAttention(nn.Module):
    """Attention of one layer; only a layer that owns keys and values projects them."""

    def __init__(self, config: KVShareConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        queries = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        if config.kv_source_layers[layer] == layer:
            width = config.num_key_value_heads * config.head_dim
            self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[b, s, heads x d] -> [b, heads, s, d]``."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def key_value(self, x: torch.Tensor, rows: Rows) -> KV:
        return KV(rotate(self.heads(self.k_proj(x)), rows), self.heads(self.v_proj(x)))

    def forward(
        self, x: torch.Tensor, rows: Rows, kv: KV, visible: Visible
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[b, s, h]``, and the weights ``[b, n, s, t]`` where the function has them."""
        query = rotate(self.heads(self.q_proj(x)), rows)
        name, weights = visible.by, None
        if name == "eager":
            out, weights = eager_attention(self, query, *kv, visible)
        elif "flash" in name and not visible.beside:
            out = self._flash(ALL_ATTENTION_FUNCTIONS[name], query, kv, visible)
        else:
            settings = {"scaling": self.scaling, "dropout": 0.0, **visible.beside}
            out, _ = ALL_ATTENTION_FUNCTIONS[name](self, query, *kv, visible.mask, **settings)
            out = out.reshape(*x.shape[:2], -1, self.head_dim)  # servers leave the batch away
        if visible.blind is not None and weights is None:
            out = out.masked_fill(visible.blind[..., None, None], 0.0)
        return self.o_proj(out.flatten(2)), weights

    def _flash(self, function: Any, query: torch.Tensor, kv: KV, visible: Visible) -> torch.Tensor:
        """Kernels that know causal masks only, the last query seeing the last key: a strict mask is
        the causal one with the last key left out, and the first query where nothing came before."""
        window, padding, skipped = visible.window, visible.padding, 0
        if visible.strict:
            window = None if window is None else window - 1
        settings = {"scaling": self.scaling, "dropout": 0.0, "is_causal": True}
        settings["sliding_window"] = window
        if visible.document is not None:
            return self._flash_documents(function, query, kv, visible, settings)
        if visible.strict and query.shape[2] > 1:
            kv = KV(*(x[:, :, :-1] for x in kv))
            padding = None if padding is None else padding[:, :-1]
            skipped = max(query.shape[2] - kv.key.shape[2], 0)
        out, _ = function(self, query[:, :, skipped:], *kv, padding, **settings)
        return F.pad(out, (0, 0, 0, 0, skipped, 0))

    def _flash_documents(
        self, function: Any, query: torch.Tensor, kv: KV, visible: Visible, settings: dict[str, Any]
    ) -> torch.Tensor:
        """The same of every document, all rows as one and their lengths beside."""
        ends = visible.document.diff(dim=-1) != 0
        first = F.pad(ends, (1, 0), value=True).flatten()
        last = F.pad(ends, (0, 1), value=True).flatten()
        lengths = last.nonzero()[:, 0] - first.nonzero()[:, 0] + (0 if visible.strict else 1)
        asking = ~first if visible.strict else torch.ones_like(first)
        read = ~last if visible.strict else torch.ones_like(last)
        flat, *read_kv = (x.transpose(1, 2).flatten(0, 1) for x in (query, *kv))
        bounds = F.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
        settings |= {f"cu_seq_lens_{side}": bounds for side in "qk"}
        settings |= {f"max_length_{side}": int(lengths.max()) for side in "qk"}
        inputs = [flat[asking], *(x[read] for x in read_kv)]
        out, _ = function(self, *(x.transpose(0, 1)[None] for x in inputs), None, **settings)
        out = torch.zeros_like(flat).index_put((asking,), out[0])
        return out.unflatten(0, (len(query), -1))


class KVShareLayer(GradientCheckpointingLayer):
    def __init__(self, config: KVShareConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = KVShareAttention(config, layer)
        self.mlp = KVShareMLP(config)
        self.input_layernorm = KVShareRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KVShareRMSNorm(config.hidden_size, config.rms_norm_eps)

    def key_value(self, hidden: torch.Tensor, rows: Rows) -> KV:
        """The keys and values this layer owns, of hidden states that enter it."""
        return self.self_attn.key_value(self.input_layernorm(hidden), rows)

    def read(
        self,
        hidden: torch.Tensor,
        rows: Rows,
        kv: KV | None,
        visible: Visible | None,
        weights: list[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """``[b, s, h] -> [b, s, h]``, reading ``kv``; without any of it attention adds nothing.
        ``weights`` takes those of attention."""
        if kv is None or visible is None:
            return self(hidden, None, None, rows, visible, weights)
        return self(hidden, kv.key, kv.value, rows, visible, weights)

    def forward(
        self,
        hidden: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        rows: Rows,
        visible: Visible | None,
        weights: list[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """What gradients flow through stands alone among the arguments: reentrant checkpointing
        (the default before transformers 5) looks at no tensor inside a tuple."""
        if key is not None and value is not None and visible is not None:
            kv, normed = KV(key, value), self.input_layernorm(hidden)
            added, own = self.self_attn(normed, rows, kv, visible)
            hidden = hidden + added
            if weights is not None:
                weights.append(own)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class GroupKV:
    """Keys and values of a cyclic group's producers, token subset by token subset."""

    def __init__(self, stride: int, length: int) -> None:
        self.stride = stride
        self.length = length
        self.kv: dict[int, KV] = {}
        self.known: dict[int, int] = {}
        self.inputs: dict[int, torch.Tensor] = {}

    def give(self, layer: int, entered: torch.Tensor, own: KV) -> None:
        """What ``layer`` made of ``entered``, the hidden states of all tokens."""
        self.kv[layer], self.inputs[layer], self.known[layer] = own, entered, self.stride

    def put(self, layer: int, offset: int, entered: torch.Tensor, own: KV) -> None:
        """What ``layer`` made of ``entered``, the hidden states of the subset at ``offset``."""
        if self.stride == 1:
            return self.give(layer, entered, own)
        index = torch.arange(offset, self.length, self.stride, device=entered.device)
        if layer not in self.kv:
            self.kv[layer] = KV(*(self._room(x, 2) for x in own))
            self.inputs[layer] = self._room(entered, 1)
        pairs = zip(self.kv[layer], own, strict=True)
        self.kv[layer] = KV(*(old.index_copy(2, index, new) for old, new in pairs))
        self.inputs[layer] = self.inputs[layer].index_copy(1, index, entered.detach())
        self.known[layer] = max(self.known.get(layer, 0), offset + 1)

    def _room(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(part.shape)
        shape[dim] = self.length
        return part.new_zeros(shape)

    def moved_by(self, before: dict[int, KV], layers: set[int]) -> float:
        """``||KV_n - KV_{n-1}|| / ||KV_n||``."""
        change = total = 0.0
        for layer in layers:
            for new, old in zip(self.kv[layer], before[layer], strict=True):
                change += float((new - old).double().square().sum())
                total += float(new.double().square().sum())
        return math.sqrt(change / total) if total else 0.0


def interleaved(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """What belongs to the subsets of tokens, along ``dim``, in the order of the tokens."""
    if len(parts) == 1:
        return parts[0]
    order = torch.arange(sum(part.shape[dim] for part in parts), device=parts[0].device)
    order = torch.cat([order[offset :: len(parts)] for offset in range(len(parts))])
    return torch.cat(parts, dim=dim).index_select(dim, order.argsort())


class Record:
    """What every layer computed last, as transformers returns it: of a cyclic group that is its
    last sweep, and for one token after another the only one."""

    def __init__(self, tokens: NewTokens, states: bool, weights: bool) -> None:
        self.tokens = tokens
        self.wants_states = states
        self.wants_weights = weights
        self._states: dict[int, dict[int, torch.Tensor]] = {}
        self._weights: dict[int, dict[int, torch.Tensor]] = {}

    def put(self, layer: int, rows: Rows, hidden: torch.Tensor, weights: list[Any] | None) -> None:
        """What ``layer`` made of the tokens ``rows``; nothing in ``weights``: it saw no key."""
        if self.wants_states:
            self._states.setdefault(layer, {})[rows.offset] = hidden
        if weights is not None:
            self._weights.setdefault(layer, {})[rows.offset] = self._whole(hidden, weights)

    def _whole(self, hidden: torch.Tensor, weights: list[Any]) -> torch.Tensor:
        """``[b, n, s, t]`` for all tokens ``t``: a layer need not see those that came last."""
        count, config = self.tokens.past + self.tokens.length, self.tokens.config
        if not weights:
            shape = (hidden.shape[0], config.num_attention_heads, hidden.shape[1], count)
            return hidden.new_zeros(shape)
        unseen = count - weights[0].shape[-1]
        return F.pad(weights[0], (0, unseen)) if unseen > 0 else weights[0]

    def states(self) -> list[torch.Tensor]:
        """``[b, s, h]`` after each layer, in the order the tokens came in."""
        parts = [self._states[layer] for layer in sorted(self._states)]
        whole = [interleaved([each[offset] for offset in sorted(each)], 1) for each in parts]
        return [self.tokens.as_given(x, 1) for x in whole]

    def weights(self) -> list[torch.Tensor]:
        """``[b, n, s, t]`` of each layer, queries and keys in the order the tokens came in."""
        parts = [self._weights[layer] for layer in sorted(self._weights)]
        whole = [interleaved([each[offset] for offset in sorted(each)], 2) for each in parts]
        return [self.tokens.as_given(self.tokens.as_given(x, 2), 3) for x in whole]


class Forward:
    """One forward through the layers: what they read is here, never on a module."""

    def __init__(
        self,
        layers: nn.ModuleList,
        config: KVShareConfig,
        tokens: NewTokens,
        cache: Any,
        training: bool,
        record: Record,
    ) -> None:
        self.layers = layers
        self.config = config
        self.tokens = tokens
        self.cache = cache
        self.training = training
        self.record = record
        self.slots = {layer: slot for slot, layer in enumerate(config.kv_layers)}
        self.kv: dict[int, KV] = {}

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        groups = dict(self.config.cyclic_groups) if self.tokens.length > 1 else {}
        layer = 0
        while layer < len(self.layers):
            last = groups.get(layer, layer)
            if layer in groups:
                hidden = self.iterate(layer, last, hidden)
            else:
                hidden = self.once(layer, hidden)
            layer = last + 1
        return hidden

    def once(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """One layer for all new tokens; an upward one (of a single token) reads the cache alone."""
        layer, source = self.layers[number], self.config.kv_source_layers[number]
        rows = self.tokens.rows()
        if source == number:
            self.keep(number, layer.key_value(hidden, rows))
        kv = self.kv.get(source) or self.past(source)
        visible = None if kv is None else self.tokens.visible(number, rows, kv.key.shape[2])
        return self.read(number, hidden, rows, kv, visible)

    def read(
        self,
        number: int,
        hidden: torch.Tensor,
        rows: Rows,
        kv: KV | None,
        visible: Visible | None,
    ) -> torch.Tensor:
        """What layer ``number`` makes of ``hidden``, recorded where that is wanted."""
        weights: list[torch.Tensor | None] | None = [] if self.record.wants_weights else None
        hidden = self.layers[number].read(hidden, rows, kv, visible, weights)
        self.record.put(number, rows, hidden, weights)
        return hidden

    def past(self, producer: int) -> KV | None:
        """What the cache held before this forward."""
        if not self.tokens.past:
            return None
        layer = self.cache.layers[self.slots[producer]]
        return KV(layer.keys, layer.values)

    def keep(self, producer: int, new: KV) -> None:
        """Put keys and values of the new tokens where later layers, and later tokens, find them."""
        if self.cache is None:
            self.kv[producer] = new
            return
        position = torch.arange(self.tokens.length, device=new.key.device) + self.tokens.past
        stored = [self.tokens.as_given(x, 2) for x in new]
        slot, where = self.slots[producer], {"cache_position": position}
        everything = KV(*self.cache.update(*stored, slot, where))
        self.kv[producer] = new if self.tokens.order is not None else everything

    def iterate(self, first: int, last: int, entered: torch.Tensor) -> torch.Tensor:
        """The sweeps of layers ``first..last``, all from the same input; the last one's KV stay."""
        stride, sweeps, settled = self.sweeps(entered.dtype)
        group, rows = range(first, last + 1), self.tokens.rows()
        state = GroupKV(stride, self.tokens.length)
        targets = {self.config.kv_source_layers[layer] for layer in group[:-1]} & set(group)
        with torch.set_grad_enabled(sweeps[0] and torch.is_grad_enabled()):
            self.begin(group, targets, entered, state)
        for number, gradient in enumerate(sweeps):
            before = dict(state.kv)
            with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
                first_with_gradient = gradient and not any(sweeps[:number])
                if first_with_gradient and self.config.iter_project_at_use:
                    self.project(targets, state, rows)
                entering_top = self.sweep(group, entered, state)
            if settled and number and state.moved_by(before, targets) <= settled:
                break
        for producer, own in state.kv.items():
            self.keep(producer, own)
        kv = self.kv[last]
        visible = self.tokens.visible(last, rows, kv.key.shape[2])
        return self.read(last, entering_top, rows, kv, visible)

    def sweeps(self, dtype: torch.dtype) -> tuple[int, list[bool], float | None]:
        """Stride, whether each sweep is under gradient, and the change below which to stop."""
        config = self.config
        how = "trained" if self.training else config.kv_prefill
        stride, (without, with_gradient) = token_stride(config, self.training), config.iter_passes
        settled = None
        if how == "converged":
            without, with_gradient = _CONVERGED[1:]
        elif how == "exact":
            settled = _SETTLED.get(dtype, _SETTLED_LOW_PRECISION)
            without, with_gradient = -(-self.tokens.longest // stride) - 1, 1
        if stride > 1 and "flash" in self.tokens.attention:
            raise ValueError(
                "strided sweeps need a mask between token subsets, which flash attention does not "
                "take: load the model with attn_implementation='sdpa'"
            )
        return stride, [False] * without + [True] * with_gradient, settled

    def begin(self, group: range, targets: set[int], entered: torch.Tensor, state: GroupKV) -> None:
        """What the first sweep reads of tokens that it has not visited."""
        start, rows = self.config.iter_start, self.tokens.rows()
        if self.config.kv_prefill != "trained" and not self.training:
            return
        if start == "input":
            for layer in targets:
                state.give(layer, entered, self.layers[layer].key_value(entered, rows))
        if start == "self":
            with torch.no_grad():
                self.guess(group, entered, state, rows)

    def guess(self, group: range, hidden: torch.Tensor, state: GroupKV, rows: Rows) -> None:
        """A sweep in which upward layers read their source's projections of their own input."""
        for number in group:
            layer, source = self.layers[number], self.config.kv_source_layers[number]
            if source == number:
                state.give(number, hidden, layer.key_value(hidden, rows))
            if number == group[-1]:
                return
            if source > number:
                kv = self.after_past(source, self.layers[source].key_value(hidden, rows))
            else:
                kv = self.readable(source, state)[0]
            visible = self.tokens.visible(number, rows, kv.key.shape[2])
            hidden = layer.read(hidden, rows, kv, visible)

    def project(self, targets: set[int], state: GroupKV, rows: Rows) -> None:
        """Keys and values again, with gradient, of what entered the layers that own them."""
        if torch.is_grad_enabled():
            for layer in targets & state.inputs.keys():
                entered = state.inputs[layer].detach()
                state.give(layer, entered, self.layers[layer].key_value(entered, rows))

    def sweep(self, group: range, entered: torch.Tensor, state: GroupKV) -> torch.Tensor:
        """Every token through the group; returns what enters its top layer."""
        parts = []
        for offset in range(min(state.stride, self.tokens.length)):
            rows = self.tokens.rows(offset, state.stride)
            hidden = entered[:, offset :: state.stride]
            for number in group:
                layer, source = self.layers[number], self.config.kv_source_layers[number]
                if source == number:
                    state.put(number, offset, hidden, layer.key_value(hidden, rows))
                if number == group[-1]:
                    break
                kv, known = self.readable(source, state)
                visible = None
                if kv is not None:
                    visible = self.tokens.visible(number, rows, kv.key.shape[2], known)
                hidden = self.read(number, hidden, rows, kv, visible)
            parts.append(hidden)
        return interleaved(parts, 1)

    def readable(self, source: int, state: GroupKV) -> tuple[KV | None, int | None]:
        """Keys and values of ``source``, and how many subsets are known where not all are."""
        if source in self.kv:
            return self.kv[source], None
        if source not in state.kv:
            return self.past(source), None
        known = state.known[source]
        return self.after_past(source, state.kv[source]), known if known < state.stride else None

    def after_past(self, producer: int, new: KV) -> KV:
        past = self.past(producer)
        if past is None:
            return new
        return KV(*(torch.cat(both, dim=2) for both in zip(past, new, strict=True)))


class KVSharePreTrainedModel(PreTrainedModel):
    config_class = KVShareConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KVShareLayer"]  # noqa: RUF012  # as transformers reads it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """It is read in every forward; transformers looks for its own way of doing so."""
        return True


_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")


def refuse(unknown: dict[str, Any]) -> None:
    """An argument that is ignored may change results without a word (a cache under a new name):
    what is not known here must be off."""
    unknown = {**unknown, "is_causal": unknown.get("is_causal") is False}
    wanted = [name for name, value in unknown.items() if value is not None and value is not False]
    if wanted:
        raise ValueError(f"this model does not take {', '.join(sorted(wanted))}")


def check_order(
    cache_position: torch.Tensor | None, position_ids: torch.Tensor | None, past: int, length: int
) -> None:
    """New tokens come after those in the cache, one after another, each with one position."""
    if cache_position is not None and cache_position.tolist() != [*range(past, past + length)]:
        raise ValueError(f"cache_position must count up from {past}, the tokens in the cache")
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != length):
        raise ValueError(
            f"position_ids must be [batch, new tokens], {length} of them; it is "
            f"{list(position_ids.shape)}"
        )


def real_tokens(attention_mask: Any, shape: torch.Size, past: int) -> torch.Tensor | None:
    """``[b, all tokens]``, True for real ones; None: all are."""
    wanted = (shape[0], past + shape[1])
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != wanted:
        got = getattr(attention_mask, "shape", None)
        got = type(attention_mask).__name__ if got is None else list(got)
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {list(wanted)}, those in the cache among "
            f"them, 1 for real tokens and 0 for padding; it is {got}"
        )
    real = attention_mask.bool()
    return None if bool(real.all()) else real


class KVShareModel(KVSharePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: KVShareConfig) -> None:
        super().__init__(config)
        config.check()
        self.rotary = Rotary(config)
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*size, padding_idx=config.pad_token_id)
        layers = (KVShareLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = KVShareRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        cache_position: torch.LongTensor | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        packing = {name: more.pop(name, None) for name in _PACKING}
        self.config.check()
        wanted = self.config.output_hidden_states
        wanted = wanted if output_hidden_states is None else output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        attention = "eager" if output_attentions else self.config._attn_implementation
        served = self._served(attention, more, bool(output_attentions))
        if cache is not None and past_key_values is not None:
            raise ValueError(
                "give either cache or past_key_values, its name before transformers 5.24"
            )
        cache = past_key_values if cache is None else cache
        self._check_cache(cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        shape = inputs_embeds.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        check_order(cache_position, position_ids, past, shape[1])
        real = real_tokens(attention_mask, shape, past)
        given = {"attention_mask": attention_mask, "a cache": cache, "use_cache=True": use_cache}
        alone = [name for name, value in given.items() if value is not None and value is not False]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if position_ids is not None:
            position_ids = position_ids.expand(shape)
        documents = None
        if served:
            self._check_alone(alone, packing)
            use_cache = False
        else:
            ends = document_ends(shape, position_ids, real, packing, bool(alone or use_cache))
            documents = self._documents(ends, packing, alone)
        if cache is None and use_cache and documents is None:
            cache = DynamicCache()
        # Weights of attention that are returned are the very ones gradients flow through.
        in_order = bool(output_attentions) and token_stride(self.config, self.training) == 1
        about = (past, real, position_ids, documents, attention, served, in_order)
        tokens = NewTokens(self, inputs_embeds, *about)
        record = Record(tokens, bool(wanted), bool(output_attentions))
        forward = Forward(self.layers, self.config, tokens, cache, self.training, record)
        hidden = forward.run(tokens.real_first(inputs_embeds, 1))
        output = BaseModelOutputWithPast(
            last_hidden_state=tokens.as_given(self.norm(hidden), 1), past_key_values=cache
        )
        if wanted:
            states = (inputs_embeds, *record.states())
            if getattr(self.config, "tie_last_hidden_states", None) is not False:
                states = (*states[:-1], output.last_hidden_state)
            output.hidden_states = chosen(states, wanted)
        if output_attentions:
            output.attentions = tuple(record.weights())
        return output

    def _documents(
        self, ends: dict[str, torch.Tensor], packing: dict[str, Any], alone: list[str]
    ) -> Documents | None:
        """Several documents in a row, as ``ends`` say; ``alone``: what does not go with them."""
        names = [name for name, end in ends.items() if bool(end.any())]
        if not names:
            return None
        if alone:
            raise ValueError(
                f"{' and '.join(names)}: several documents in a row cannot be computed with "
                f"{' and '.join(alone)}. Leave that away, or give each document a row of its own"
            )
        for name, end in ends.items():
            if not torch.equal(end, ends[names[0]]):
                raise ValueError(f"{name} and {names[0]} say that other tokens end a document")
        starts = F.pad(ends[names[0]], (1, 0), value=True)
        documents = Documents.of(starts, token_stride(self.config, self.training))
        for name in ("max_length_q", "max_length_k"):
            if packing[name] is not None and int(packing[name]) < documents.longest:
                raise ValueError(f"{name} is {int(packing[name])}, a document {documents.longest}")
        return documents

    def _served(self, attention: str, more: dict[str, Any], weights: bool) -> dict[str, Any]:
        """What a server hands its own attention function through the model; nothing otherwise.

        A server that computes attention (``attention_instances``, one of every layer) keeps keys
        and values itself, and sees what is before a token in its own text.
        """
        own = attention in ("eager", "sdpa", "flex_attention")
        own = own or ("flash" in attention and "|" not in attention)
        given, config = more.get("attention_instances") is not None, self.config
        if given and weights:
            raise ValueError("attention_instances go without output_attentions")
        refuse({} if given and not own else {**more, "attention_instances": None})
        if not own and not given:
            raise ValueError(
                f"attn_implementation {attention!r}: take sdpa, eager, flex_attention or "
                "flash_attention_*"
            )
        if given and (config.cyclic_groups or config.kv_windowed_layers):
            rule = "windows" if config.kv_windowed_layers else "layers that read higher ones"
            raise ValueError(
                f"attention_instances know nothing of {rule}: this map cannot be served by them"
            )
        return more if given and not own else {}

    def _check_alone(self, alone: list[str], packing: dict[str, Any]) -> None:
        alone = [*alone, *(name for name, value in packing.items() if value is not None)]
        if alone:
            raise ValueError(f"attention_instances go without {' and '.join(alone)}")

    def _check_cache(self, cache: Any) -> None:
        if cache is None:
            return
        name = type(cache).__name__
        if not isinstance(cache, Cache):
            raise ValueError(f"past_key_values must be a Cache, as DynamicCache(), not {name}")
        if any(getattr(cache, "is_sliding", ())):
            raise ValueError(
                f"{name} with windows drops tokens: here windows are masks. Use DynamicCache()"
            )
        offloading = getattr(cache, "offloading", False)
        name += " with offloading" if offloading else ""
        if self.config.cyclic_groups and (offloading or not isinstance(cache, DynamicCache)):
            raise ValueError(
                f"{name} cannot serve a map in which layers read higher ones: they "
                "read the cache before the new token is in it. Use DynamicCache() (the default)"
            )


def chosen(
    states: Sequence[torch.Tensor], wanted: bool | int | Sequence[int]
) -> tuple[torch.Tensor | None, ...]:
    """All states, or those at the places that are named; None at the others."""
    if isinstance(wanted, bool):
        return tuple(states)
    count, places = len(states), [wanted] if isinstance(wanted, int) else wanted
    places = {place % count for place in places if -count <= place < count}
    return tuple(x if place in places else None for place, x in enumerate(states))


def kept(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last tokens, or those named: for all rows, or ``[b, kept]``; of a mask, flattened."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.dim() < 2:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    return hidden.take_along_dim(logits_to_keep[..., None], dim=1)


class KVShareForCausalLM(KVSharePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KVShareConfig) -> None:
        super().__init__(config)
        self.model = KVShareModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_name(self) -> str:
        """Trainer shifts smoothed labels of models that it knows by this name, and of no others."""
        return "LlamaForCausalLM"

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        about_loss = {name: more.pop(name, None) for name in _LOSS}
        about_loss = {name: value for name, value in about_loss.items() if value is not None}
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        output = self.model(*given, cache=cache, **more, return_dict=True)
        logits = self.lm_head(kept(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or "shift_labels" in about_loss:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **about_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Any, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Masks stay ``[batch, tokens]`` for every kind of cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        return {**inputs, "attention_mask": attention_mask}

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Several drafted tokens are checked in one forward: what greedy decoding gives only where
        that is exact."""
        if self.config.cyclic_groups and self.config.kv_prefill != "exact":
            raise ValueError("assisted generation of this map needs kv_prefill='exact'")
        return super()._assisted_decoding(*args, **kwargs)


class KVShareForSequenceClassification(GenericForSequenceClassification, KVSharePreTrainedModel):
    """transformers' head over the decoder, which it looks for by its name."""

    def __init__(self, config: KVShareConfig) -> None:
        KVSharePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = KVShareModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class KVShareForTokenClassification(GenericForTokenClassification, KVSharePreTrainedModel):
    """As :class:`KVShareForSequenceClassification`."""

    def __init__(self, config: KVShareConfig) -> None:
        KVSharePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = KVShareModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class KVShareForQuestionAnswering(GenericForQuestionAnswering, KVSharePreTrainedModel):
    """As :class:`KVShareForSequenceClassification`."""

    def __init__(self, config: KVShareConfig) -> None:
        KVSharePreTrainedModel.__init__(self, config)
        self.model = KVShareModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
