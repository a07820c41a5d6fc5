"""A naive Llama-shaped model with cross-layer KV sharing: what the product must equal.

Plain torch, nothing of `megatron_kvshare`: a sharing map is a list of integers (layer i pairs its
queries with the keys and values of layer `sources[i]`) and a list of flags for sliding windows;
weights are a dictionary of Hugging Face Llama names. One sequence at a time, one head at a time,
masks as matrices of booleans, in the precision of the given weights. It is written to be checked by
eye and is as slow as that makes it.

Two evaluations:

* `token_by_token` defines the model: one token after another through all layers, one cache per
  producer; an upward layer (its source is above it) reads the cache as it stood before this token.
* `iterated` is the published training method ("A Systematic Study of Cross-Layer KV Sharing for
  Efficient LLM Inference", arXiv 2410.14442): every cyclic group runs m passes without and b passes
  with gradient, each pass in full; upward layers read the keys and values of the pass before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, each [tokens, kv heads, head width]."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3 frequency scaling; the names are those of a Hugging Face configuration."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the weights alone do not say about the model."""

    num_attention_heads: int
    num_query_groups: int
    head_width: int
    window_size: int | None = None
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None


def cyclic_groups(sources: Sequence[int]) -> list[tuple[int, int]]:
    """Intervals (first, last) of layers that are iterated together, from the definition."""
    groups: list[tuple[int, int]] = []
    layer = 0
    while layer < len(sources):
        if sources[layer] <= layer:
            layer += 1
            continue
        first, top = layer, sources[layer]
        while max(sources[first : top + 1]) > top:
            top = max(sources[first : top + 1])
        groups.append((first, top))
        layer = top + 1
    return groups


def visible(documents: Sequence[int], strict: bool, window: int | None) -> Tensor:
    """[queries, keys] booleans: may token t see token u?"""
    rows = []
    for t, document in enumerate(documents):
        oldest = 0 if window is None else t - window + 1
        newest = t - 1 if strict else t
        rows.append(
            [oldest <= u <= newest and other == document for u, other in enumerate(documents)]
        )
    return torch.tensor(rows)


def attend(queries: Tensor, keys: Tensor, values: Tensor, may_see: Tensor) -> Tensor:
    """Attention of every head by itself; a query that sees nothing gets exactly 0.

    queries [tokens, heads, width], keys and values [other tokens, kv heads, width], may_see
    [tokens, other tokens]. Returns [tokens, heads * width]. The softmax is spelled out, so an empty
    row needs no infinities.
    """
    heads, width = queries.shape[1:]
    heads_per_kv_head = heads // keys.shape[1]
    outputs = []
    for head in range(heads):
        key, value = keys[:, head // heads_per_kv_head], values[:, head // heads_per_kv_head]
        scores = queries[:, head] @ key.T / math.sqrt(width)
        unnormalised = torch.where(may_see, scores.exp(), torch.zeros_like(scores))
        total = unnormalised.sum(dim=1, keepdim=True)
        outputs.append(unnormalised / torch.where(total > 0, total, 1.0) @ value)
    return torch.cat(outputs, dim=1)


class Oracle:
    """The naive model for one sharing map, one shape and one set of weights."""

    def __init__(
        self,
        sources: Sequence[int],
        windowed: Sequence[bool],
        shape: Shape,
        weights: Mapping[str, Tensor],
    ):
        self.sources, self.windowed = list(sources), list(windowed)
        self.shape, self.weights = shape, dict(weights)
        self.num_layers = len(self.sources)
        self.groups = cyclic_groups(self.sources)

    # Parts of a layer -----------------------------------------------------------------------------

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        prefix = "model" if layer is None else f"model.layers.{layer}"
        return self.weights[f"{prefix}.{name}.weight"]

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        mean_square = (hidden * hidden).mean(dim=-1, keepdim=True)
        return hidden / torch.sqrt(mean_square + self.shape.norm_epsilon) * weight

    def frequencies(self) -> list[float]:
        width, scaling = self.shape.head_width, self.shape.rope_scaling
        plain = [self.shape.rotary_base ** (-2 * i / width) for i in range(width // 2)]
        return plain if scaling is None else [scaled_frequency(f, scaling) for f in plain]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, heads, width] turned by its positions, dimension i with i + width/2."""
        frequencies = torch.tensor(self.frequencies(), dtype=torch.float64)
        angles = positions.double()[:, None, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    def queries(self, normed: Tensor, layer: int, positions: Tensor) -> Tensor:
        flat = normed @ self.weight("self_attn.q_proj", layer).T
        return self.rotate(
            flat.view(len(normed), self.shape.num_attention_heads, self.shape.head_width), positions
        )

    def keys_values(self, normed: Tensor, layer: int, positions: Tensor) -> KeyValue:
        size = (len(normed), self.shape.num_query_groups, self.shape.head_width)
        keys = (normed @ self.weight("self_attn.k_proj", layer).T).view(size)
        values = (normed @ self.weight("self_attn.v_proj", layer).T).view(size)
        return self.rotate(keys, positions), values

    def attention_output(self, attended: Tensor, layer: int) -> Tensor:
        return attended @ self.weight("self_attn.o_proj", layer).T

    def mlp(self, hidden: Tensor, layer: int) -> Tensor:
        normed = self.norm(hidden, self.weight("post_attention_layernorm", layer))
        gate = normed @ self.weight("mlp.gate_proj", layer).T
        up = normed @ self.weight("mlp.up_proj", layer).T
        return (F.silu(gate) * up) @ self.weight("mlp.down_proj", layer).T

    def window(self, layer: int) -> int | None:
        return self.shape.window_size if self.windowed[layer] else None

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weight("embed_tokens")[tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.weights.get("lm_head.weight", self.weight("embed_tokens"))
        return self.norm(hidden, self.weight("norm")) @ head.T

    # One token after another ----------------------------------------------------------------------

    def token_by_token(
        self, tokens: Tensor, documents: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        documents, positions = defaults(tokens, documents, positions)
        rows = zip(tokens, documents, positions, strict=True)
        return torch.stack([self._sequence_by_token(*row) for row in rows])

    def _sequence_by_token(self, tokens: Tensor, documents: Tensor, positions: Tensor) -> Tensor:
        caches: dict[int, list[KeyValue]] = {i: [] for i in set(self.sources)}
        logits = []
        for t in range(len(tokens)):
            if t > 0 and documents[t] != documents[t - 1]:
                caches = {i: [] for i in caches}
            hidden = self._one_token(self.embed(tokens[t : t + 1]), positions[t : t + 1], caches)
            logits.append(self.logits(hidden))
        return torch.cat(logits)

    def _one_token(
        self, hidden: Tensor, positions: Tensor, caches: dict[int, list[KeyValue]]
    ) -> Tensor:
        """One token [1, hidden] through all layers; a cache holds the document's tokens so far."""
        for layer, source in enumerate(self.sources):
            normed = self.norm(hidden, self.weight("input_layernorm", layer))
            if source == layer:
                caches[layer].append(self.keys_values(normed, layer, positions))
            # At an upward layer the source has not seen this token yet: its cache ends one token
            # before. A window holds the W tokens which end with this one.
            window = self.window(layer)
            if window is None:
                cached = caches[source]
            else:
                kept = window - 1 if source > layer else window
                cached = caches[source][-kept:] if kept else []
            if cached:
                keys, values = (torch.cat(parts) for parts in zip(*cached, strict=True))
                everything = torch.ones(1, len(cached), dtype=torch.bool)
                attended = attend(self.queries(normed, layer, positions), keys, values, everything)
                hidden = hidden + self.attention_output(attended, layer)
            hidden = hidden + self.mlp(hidden, layer)
        return hidden

    # Iterated passes ------------------------------------------------------------------------------

    def iterated(
        self,
        tokens: Tensor,
        passes: tuple[int, int],
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] after `passes` = (without gradient, with gradient)."""
        documents, positions = defaults(tokens, documents, positions)
        rows = zip(tokens, documents, positions, strict=True)
        return torch.stack([self._sequence_in_passes(*row, passes) for row in rows])

    def _sequence_in_passes(
        self, tokens: Tensor, documents: Tensor, positions: Tensor, passes: tuple[int, int]
    ) -> Tensor:
        place = (documents.tolist(), positions)
        hidden = self.embed(tokens)
        produced: dict[int, KeyValue] = {}
        layer = 0
        while layer < self.num_layers:
            last = dict(self.groups).get(layer)
            if last is None:
                hidden = self._run_layer(layer, hidden, produced, place)
                layer += 1
            else:
                hidden = self._run_group(range(layer, last + 1), hidden, produced, place, passes)
                layer = last + 1
        return self.logits(hidden)

    def _run_group(self, group, group_input, produced, place, passes) -> Tensor:
        """All passes of a cyclic group; leaves the last pass's keys and values in `produced`."""
        without_gradient, with_gradient = passes
        hidden = group_input
        for number in range(without_gradient + with_gradient):
            # Within a pass a producer overwrites its keys and values when its layer runs. What an
            # upward layer finds before that moment is what the previous pass left there (nothing in
            # the first).
            with torch.no_grad() if number < without_gradient else nullcontext():
                hidden = group_input
                for layer in group:
                    hidden = self._run_layer(layer, hidden, produced, place)
        return hidden

    def _run_layer(self, layer: int, hidden: Tensor, produced, place) -> Tensor:
        """One layer over all tokens; a producer puts its keys and values into `produced`."""
        documents, positions = place
        normed = self.norm(hidden, self.weight("input_layernorm", layer))
        source = self.sources[layer]
        if source == layer:
            produced[layer] = self.keys_values(normed, layer, positions)
        if source in produced:
            may_see = visible(documents, strict=source > layer, window=self.window(layer))
            queries = self.queries(normed, layer, positions)
            attended = attend(queries, *produced[source], may_see)
            hidden = hidden + self.attention_output(attended, layer)
        return hidden + self.mlp(hidden, layer)


def scaled_frequency(frequency: float, scaling: RopeScaling) -> float:
    """Llama 3: long waves are slowed down by `factor`, short ones kept, those between blended."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = min(1.0, max(0.0, kept))
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def defaults(
    tokens: Tensor, documents: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Without documents a row is one document; without positions it counts from its start."""
    documents = torch.zeros_like(tokens) if documents is None else documents
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
    return documents, positions


def loss_and_gradients(
    oracle: Oracle, tokens: Tensor, labels: Tensor, passes: tuple[int, int], **where: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross entropy of iterated evaluation and its gradient for every weight, by name."""
    leaves = {name: w.detach().clone().requires_grad_() for name, w in oracle.weights.items()}
    model = Oracle(oracle.sources, oracle.windowed, oracle.shape, leaves)
    logits = model.iterated(tokens, passes, **where)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zero_if_unused = (
        torch.zeros_like(w) if g is None else g
        for w, g in zip(leaves.values(), gradients, strict=True)
    )
    return loss.detach(), dict(zip(leaves, zero_if_unused, strict=True))


def random_weights(
    sources: Sequence[int],
    shape: Shape,
    *,
    hidden: int,
    ffn: int,
    vocabulary: int,
    tied: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """fp32 weights by name, large enough for attention to matter; norms are random around 1.

    What a layer adds to the hidden states shrinks with the depth, as in any trainable
    initialisation: without that, twelve layers iterated nine times magnify rounding beyond what
    fp32 results can be compared at.
    """
    residual_scale = len(sources) ** -0.5
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def around_one() -> Tensor:
        return 1 + 0.2 * torch.randn(hidden, generator=generator)

    query_width = shape.num_attention_heads * shape.head_width
    key_width = shape.num_query_groups * shape.head_width
    weights = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator)}
    for layer, source in enumerate(sources):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = around_one()
        weights[f"{prefix}.self_attn.q_proj.weight"] = matrix(query_width, hidden)
        if source == layer:
            weights[f"{prefix}.self_attn.k_proj.weight"] = matrix(key_width, hidden)
            weights[f"{prefix}.self_attn.v_proj.weight"] = matrix(key_width, hidden)
        weights[f"{prefix}.self_attn.o_proj.weight"] = residual_scale * matrix(hidden, query_width)
        weights[f"{prefix}.post_attention_layernorm.weight"] = around_one()
        weights[f"{prefix}.mlp.gate_proj.weight"] = matrix(ffn, hidden)
        weights[f"{prefix}.mlp.up_proj.weight"] = matrix(ffn, hidden)
        weights[f"{prefix}.mlp.down_proj.weight"] = residual_scale * matrix(hidden, ffn)
    weights["model.norm.weight"] = around_one()
    if not tied:
        weights["lm_head.weight"] = matrix(vocabulary, hidden)
    return weights
