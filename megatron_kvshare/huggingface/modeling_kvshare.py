"""A Llama-shaped decoder whose layers share keys and values (arXiv 2410.14442).

This file travels with every exported model and stands alone: torch, transformers and
``configuration_kvshare.py`` beside it. Shapes: b batch, s new tokens, t all tokens a query may
read, n query heads, g key-value heads, d width of a head, h width of the hidden states.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    """Which keys attention sees.

    ``mask``: ``[b or 1, 1, s, t]``, True = seen; None = every earlier key and the token's own.
    ``blind``: ``[b or 1, s]``, queries that see nothing and attend to nothing. ``strict``,
    ``window`` and ``padding`` ``[b, t]`` say the same to attention functions that take no mask.
    """

    mask: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    strict: bool = False
    window: int | None = None
    padding: torch.Tensor | None = None


class Rows(NamedTuple):
    """The new tokens ``offset::stride``, which run together; rotary tables ``[b, 1, s, d]``."""

    offset: int
    stride: int
    cos: torch.Tensor
    sin: torch.Tensor


class NewTokens:
    """The tokens of one forward: their rotary tables, and what they may see of each other and of
    ``past`` tokens in the cache. Made anew for every forward and passed along."""

    def __init__(
        self,
        config: KVShareConfig,
        embeddings: torch.Tensor,
        past: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> None:
        self.config = config
        self.length = embeddings.shape[1]
        self.past = past
        self.device = embeddings.device
        self.padding: torch.Tensor | None = None
        self.order: torch.Tensor | None = None
        real = None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            if attention_mask.dim() != 2:
                raise ValueError("attention_mask must be [batch, tokens], 1 for real tokens")
            real = attention_mask.bool()
        positions = position_ids
        if positions is None:
            positions = torch.arange(past, past + self.length, device=self.device)[None]
            if real is not None:
                positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if real is not None and past:
            self.padding = real
        elif real is not None:
            # Real tokens first: padding is then where no real token looks, and subsets of tokens
            # are those of the sequence without padding.
            self.order = (~real).long().argsort(dim=-1, stable=True)
            positions = positions.expand(real.shape).gather(1, self.order)
        self.cos, self.sin = rotary_tables(config, positions, embeddings.dtype)
        self._seen: dict[tuple[Any, ...], Visible | None] = {}

    def real_first(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Tokens, along ``dim``, in the order they are computed in."""
        return x if self.order is None else _take(x, self.order, dim)

    def as_given(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Tokens, along ``dim``, in the order they came in."""
        return x if self.order is None else _take(x, self.order.argsort(-1), dim)

    def rows(self, offset: int = 0, stride: int = 1) -> Rows:
        subset = (..., slice(offset, None, stride), slice(None))
        return Rows(offset, stride, self.cos[subset], self.sin[subset])

    def visible(
        self, layer: int, rows: Rows, keys: int, known: int | None = None
    ) -> Visible | None:
        """What ``layer`` sees of ``keys`` keys; of the new tokens only the first ``known`` subsets
        have any. None: not a single query sees a key.
        """
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
        padding = None if self.padding is None else self.padding[:, :keys]
        if padding is not None:
            padding = F.pad(padding, (0, keys - padding.shape[1]))
            seen = seen & padding[:, None, :]
        if not self._needs_mask(seen, rows, strict):
            return Visible(window=window)
        blind = ~seen.any(-1)
        if bool(blind.all()):
            return None
        mask = (seen | blind[..., None])[:, None]
        return Visible(mask, blind if bool(blind.any()) else None, strict, window, padding)

    def _needs_mask(self, seen: torch.Tensor, rows: Rows, strict: bool) -> bool:
        """Without one, a single query sees all keys, and as many queries as keys see causally."""
        if seen.shape[1] == 1:
            return not bool(seen.all())
        plain = rows.stride == 1 and not strict and seen.shape[1] == seen.shape[2]
        return not (plain and bool(seen[:, -1].all()))


def _take(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    """``x`` with the tokens along ``dim`` as ``order`` ``[b, s]`` says."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.take_along_dim(order.view(shape), dim)


def rotary_tables(
    config: KVShareConfig, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[b, 1, s, d]``, of frequencies that are computed in every forward."""
    rope, width = config.rope_parameters, config.head_dim
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    frequency = 1.0 / (rope["rope_theta"] ** exponent)
    if rope.get("rope_type", "default") == "llama3":
        frequency = _llama3(frequency, rope)
    angles = positions[..., None].float() * frequency
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _llama3(frequency: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths stretched by ``factor``, short ones kept, those between interpolated."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (smooth + (1 - smooth) / rope["factor"])


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
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with all weights at hand; returns ``[b, s, n, d]`` and the weights."""
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], device=key.device).tril().bool()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(query.dtype)
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

    def forward(self, x: torch.Tensor, rows: Rows, kv: KV, visible: Visible) -> torch.Tensor:
        query = rotate(self.heads(self.q_proj(x)), rows)
        name = self.config._attn_implementation
        if "flash" in name:
            out = self._flash(ALL_ATTENTION_FUNCTIONS[name], query, kv, visible)
        else:
            function = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
            scale = {"scaling": self.scaling, "dropout": 0.0}
            out, _ = function(self, query, *kv, visible.mask, **scale)
        if visible.blind is not None:
            out = out.masked_fill(visible.blind[..., None, None], 0.0)
        return self.o_proj(out.flatten(2))

    def _flash(self, function: Any, query: torch.Tensor, kv: KV, visible: Visible) -> torch.Tensor:
        """Kernels that know causal masks only, the last query seeing the last key: a strict mask is
        the causal one with the last key left out, and the first query where nothing came before."""
        window, padding, skipped = visible.window, visible.padding, 0
        if visible.strict:
            window = None if window is None else window - 1
        if visible.strict and query.shape[2] > 1:
            kv = KV(*(x[:, :, :-1] for x in kv))
            padding = None if padding is None else padding[:, :-1]
            skipped = max(query.shape[2] - kv.key.shape[2], 0)
        out, _ = function(
            self,
            query[:, :, skipped:],
            *kv,
            padding,
            scaling=self.scaling,
            dropout=0.0,
            sliding_window=window,
            is_causal=True,
        )
        return F.pad(out, (0, 0, 0, 0, skipped, 0))


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
        self, hidden: torch.Tensor, rows: Rows, kv: KV | None, visible: Visible | None
    ) -> torch.Tensor:
        """``[b, s, h] -> [b, s, h]``, reading ``kv``; without any of it attention adds nothing."""
        if kv is None or visible is None:
            return self(hidden, None, None, rows, visible)
        return self(hidden, kv.key, kv.value, rows, visible)

    def forward(
        self,
        hidden: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        rows: Rows,
        visible: Visible | None,
    ) -> torch.Tensor:
        """What gradients flow through stands alone among the arguments: reentrant checkpointing
        (the default before transformers 5) looks at no tensor inside a tuple."""
        if key is not None and value is not None and visible is not None:
            kv = KV(key, value)
            hidden = hidden + self.self_attn(self.input_layernorm(hidden), rows, kv, visible)
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

    def interleaved(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Hidden states of the subsets, one after another, in the order of the tokens."""
        order = torch.arange(self.length, device=parts[0].device)
        order = torch.cat([order[offset :: self.stride] for offset in range(len(parts))])
        return torch.cat(parts, dim=1)[:, order.argsort()]

    def moved_by(self, before: dict[int, KV], layers: set[int]) -> float:
        """``||KV_n - KV_{n-1}|| / ||KV_n||``."""
        change = total = 0.0
        for layer in layers:
            for new, old in zip(self.kv[layer], before[layer], strict=True):
                change += float((new - old).double().square().sum())
                total += float(new.double().square().sum())
        return math.sqrt(change / total) if total else 0.0


class Forward:
    """One forward through the layers: what they read is here, never on a module."""

    def __init__(
        self,
        layers: nn.ModuleList,
        config: KVShareConfig,
        tokens: NewTokens,
        cache: Any,
        training: bool,
    ) -> None:
        self.layers = layers
        self.config = config
        self.tokens = tokens
        self.cache = cache
        self.training = training
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
        return layer.read(hidden, rows, kv, visible)

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
        return self.layers[last].read(entering_top, rows, kv, visible)

    def sweeps(self, dtype: torch.dtype) -> tuple[int, list[bool], float | None]:
        """Stride, whether each sweep is under gradient, and the change below which to stop."""
        config = self.config
        how = "trained" if self.training else config.kv_prefill
        stride, without, with_gradient = config.iter_stride, *config.iter_passes
        settled = None
        if how == "converged":
            stride, without, with_gradient = _CONVERGED
        elif how == "exact":
            stride, settled = _EXACT_STRIDE, _SETTLED.get(dtype, _SETTLED_LOW_PRECISION)
            without, with_gradient = -(-self.tokens.length // stride) - 1, 1
        if stride > 1 and "flash" in config._attn_implementation:
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
                hidden = layer.read(hidden, rows, kv, visible)
            parts.append(hidden)
        return state.interleaved(parts)

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
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, KVShareRMSNorm):
            nn.init.ones_(module.weight)


def refuse(unknown: dict[str, Any]) -> None:
    """An argument that is ignored may change results without a word (a cache under a new name):
    what is not known here must be off."""
    harmless = {"return_dict", "cache_position"}
    wanted = [name for name, value in unknown.items() if value is not None and value is not False]
    if not set(wanted) <= harmless:
        raise ValueError(f"this model does not take {', '.join(sorted(set(wanted) - harmless))}")


class KVShareModel(KVSharePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: KVShareConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (KVShareLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = KVShareRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast:
        refuse(unknown)
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache:
            past_key_values = None
        elif past_key_values is None:
            past_key_values = DynamicCache()
        self._check_cache(past_key_values)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        tokens = NewTokens(self.config, inputs_embeds, past, attention_mask, position_ids)
        forward = Forward(self.layers, self.config, tokens, past_key_values, self.training)
        hidden = self.norm(forward.run(tokens.real_first(inputs_embeds, 1)))
        return BaseModelOutputWithPast(
            last_hidden_state=tokens.as_given(hidden, 1), past_key_values=past_key_values
        )

    def _check_cache(self, cache: Any) -> None:
        if self.config.cyclic_groups and cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"{type(cache).__name__} cannot serve a map in which layers read higher ones: they "
                "read the cache before the new token is in it. Use DynamicCache (the default)"
            )


class KVShareForCausalLM(KVSharePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KVShareConfig) -> None:
        super().__init__(config)
        self.model = KVShareModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

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
        num_items_in_batch: torch.Tensor | int | None = None,
        **unknown: Any,
    ) -> CausalLMOutputWithPast:
        refuse(unknown)
        past = (
            cache if past_key_values is None else past_key_values
        )  # its name before and from 5.24
        output = self.model(input_ids, attention_mask, position_ids, past, inputs_embeds, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values
        )

    def prepare_inputs_for_generation(
        self, input_ids: Any, attention_mask: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Masks stay ``[batch, tokens]`` for every kind of cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )
        return {**inputs, "attention_mask": attention_mask}
