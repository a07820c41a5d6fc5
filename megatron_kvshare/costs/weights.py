"""The table of tensors of a model (no torch): what there is, and what is done with it.

The one declarative map of parameters: counts, initial values, weight decay, the split over ranks,
checkpoints and conversions in both directions read it. Names are those of Hugging Face's Llama and
of files on disk alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.sharing.map import SharingMap

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Shape = tuple[int, ...]


class Component(StrEnum):
    """What a tensor counts as."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    KEYS_AND_VALUES = "keys_and_values"
    MLP = "mlp"
    NORMS = "norms"
    OUTPUT_HEAD = "output_head"


class Split(StrEnum):
    """How the tensor-parallel ranks share a tensor."""

    WHOLE = "whole"  # every rank holds all of it
    ROWS = "rows"
    COLUMNS = "columns"
    VOCABULARY = "vocabulary"  # by rows, after padding to as many on every rank


class Init(StrEnum):
    """Initial values."""

    NORMAL = "normal"  # standard deviation init_method_std
    RESIDUAL = "residual"  # normal, divided by sqrt(2 x layers): added to the residual stream
    ONES = "ones"


class Held(Protocol):
    """The part of a model that a pipeline stage holds."""

    @property
    def first(self) -> int: ...
    @property
    def layers(self) -> range: ...
    @property
    def embeds(self) -> bool: ...
    @property
    def predicts(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the model, whole: its ``shape`` is ``[out, in]`` as in torch's linear layers,
    without vocabulary padding.

    ``parameter``: the parameter of the model's own that holds it, inside its layer if it is of one;
    tensors of the same parameter are fused, one above the other in the order of the table.
    """

    name: str
    shape: Shape
    component: Component
    parameter: str
    layer: int | None = None
    split: Split = Split.ROWS
    init: Init = Init.NORMAL
    decays: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def initial_std(self, init_method_std: float, num_layers: int) -> float:
        """Of the normal distribution that it is drawn from, where ``init`` is not ONES."""
        is_output = self.init is Init.RESIDUAL
        return init_method_std / math.sqrt(2 * num_layers) if is_output else init_method_std

    def parameter_on(self, stage: Held) -> str:
        """The full name of its parameter in the module of a pipeline stage."""
        if self.layer is None:
            return self.parameter
        return f"decoder.layers.{self.layer - stage.first}.{self.parameter}"

    def is_on(self, stage: Held) -> bool:
        """Whether a pipeline stage holds it."""
        if self.layer is not None:
            return self.layer in stage.layers
        return stage.embeds if self.component is Component.EMBEDDING else stage.predicts


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def weights(shape: ModelShape, map: SharingMap) -> tuple[Weight, ...]:
    """Every tensor; consumers have no key and value projections, a tied head none of its own."""
    embedding = Weight(
        name=EMBEDDING,
        shape=(shape.vocab_size, shape.hidden_size),
        component=Component.EMBEDDING,
        parameter="embedding.weight",
        split=Split.VOCABULARY,
    )
    found = [embedding]
    for layer in range(map.num_layers):
        prefix = layer_prefix(layer)
        found += (
            replace(each, name=prefix + each.name, layer=layer)
            for each in _of_layer(shape, map.is_producer(layer))
        )
    found.append(_norm("model.norm.weight", "decoder.final_layernorm.weight", shape))
    if not shape.tied_embeddings:
        found.append(replace(_as_head(embedding), name=HEAD))
    return tuple(found)


def _of_layer(shape: ModelShape, is_producer: bool) -> Iterator[Weight]:
    hidden, query, kv, ffn = (
        shape.hidden_size,
        shape.query_width,
        shape.kv_width,
        shape.ffn_hidden_size,
    )
    qkv, gate_up = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
    yield _norm("input_layernorm.weight", "input_layernorm.weight", shape)
    yield _matrix("self_attn.q_proj.weight", (query, hidden), Component.ATTENTION, qkv)
    if is_producer:
        yield _matrix("self_attn.k_proj.weight", (kv, hidden), Component.KEYS_AND_VALUES, qkv)
        yield _matrix("self_attn.v_proj.weight", (kv, hidden), Component.KEYS_AND_VALUES, qkv)
    projection = "self_attention.linear_proj.weight"
    yield _output("self_attn.o_proj.weight", (hidden, query), Component.ATTENTION, projection)
    yield _norm("post_attention_layernorm.weight", "post_attention_layernorm.weight", shape)
    yield _matrix("mlp.gate_proj.weight", (ffn, hidden), Component.MLP, gate_up)
    yield _matrix("mlp.up_proj.weight", (ffn, hidden), Component.MLP, gate_up)
    yield _output("mlp.down_proj.weight", (hidden, ffn), Component.MLP, "mlp.linear_fc2.weight")


def _matrix(name: str, shape: Shape, component: Component, parameter: str) -> Weight:
    return Weight(name=name, shape=shape, component=component, parameter=parameter)


def _output(name: str, shape: Shape, component: Component, parameter: str) -> Weight:
    """What adds to the residual stream, and sums over the tensor-parallel ranks."""
    matrix = _matrix(name, shape, component, parameter)
    return replace(matrix, split=Split.COLUMNS, init=Init.RESIDUAL)


def _norm(name: str, parameter: str, shape: ModelShape) -> Weight:
    return Weight(
        name=name,
        shape=(shape.hidden_size,),
        component=Component.NORMS,
        parameter=parameter,
        split=Split.WHOLE,
        init=Init.ONES,
        decays=False,
    )


def stage_weights(shape: ModelShape, map: SharingMap, stage: Held) -> tuple[Weight, ...]:
    """The tensors that a pipeline stage holds; a tied head apart from the embedding is a copy."""
    everything = weights(shape, map)
    held = [each for each in everything if each.is_on(stage)]
    if stage.predicts and shape.tied_embeddings and not stage.embeds:
        held += (_as_head(each) for each in everything if each.component is Component.EMBEDDING)
    return tuple(held)


def _as_head(embedding: Weight) -> Weight:
    return replace(embedding, component=Component.OUTPUT_HEAD, parameter="output_layer.weight")


def count(tensors: Iterable[Weight]) -> int:
    """Their number of elements, without vocabulary padding."""
    return sum(each.size for each in tensors)


def parameters(shape: ModelShape, map: SharingMap) -> int:
    """Number of trained weights."""
    return count(weights(shape, map))


def parameters_by_component(shape: ModelShape, map: SharingMap) -> dict[str, int]:
    """The same, by component; 0 for what the model has not."""
    everything = weights(shape, map)
    return {
        component.value: count(each for each in everything if each.component is component)
        for component in Component
    }


def stage_parameters(shape: ModelShape, map: SharingMap, stage: Held) -> int:
    """Number of weights of one pipeline stage."""
    return count(stage_weights(shape, map, stage))
