"""Weights of a shared-KV model from a model without sharing, for uptraining.

Everything is copied; consumers lose ``W_K`` and ``W_V``, and those of each producer are made from
the layers that will read it. Source: arXiv 2410.14442, section 4 (``mean``); ``aligned`` is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

import networkx
import torch

from megatron_kvshare.checkpoint.tensors import TensorInfo, TensorSource
from megatron_kvshare.costs.weights import layer_prefix
from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.spec.model_spec import ModelSpec


class KVInit(StrEnum):
    """Where a producer's ``W_K`` and ``W_V`` come from."""

    MEAN = "mean"  # the mean over all layers that attend to it, its own included
    TARGET = "target"  # its own
    ALIGNED = "aligned"  # the mean, after the heads of every layer are matched to the producer's
    RANDOM = "random"  # drawn anew: what the others are compared with


@dataclass(frozen=True)
class _Alignment:
    """How the heads of a layer are turned to resemble a producer's, without changing the layer.

    ``order[j]``: the KV head that takes place ``j``; ``keys``, ``values`` ``[g, d, d]``: orthogonal
    matrices for the rows of each placed head.
    """

    order: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor


class SharedKVWeights:
    """The tensors of ``spec``'s model under the sharing ``map``, made when they are read.

    ``aligned``: the keys of a KV head may be rotated in the planes that the rotary embedding
    rotates, and its values by any orthogonal matrix, if the queries of its group and the columns of
    ``W_O`` are turned along: the layer computes what it did. Heads may trade places likewise. So
    each reader's heads are first placed and turned to be as close to the producer's as they get
    (keys: the best angle for every frequency, values: orthogonal Procrustes; inputs weighted with
    the layer's norm), then averaged; the readers' ``W_Q`` and ``W_O`` are turned too.

    Raises:
        MapError: a layer that will read a producer owns no keys and values in the source.
    """

    def __init__(
        self,
        source: TensorSource,
        spec: ModelSpec,
        map: SharingMap,
        init: KVInit,
        seed: int = 1234,
    ) -> None:
        self.source, self.shape, self.map = source, spec.shape, map
        self.init, self.seed = init, seed
        self.std = spec.model.init_method_std
        owners = set(spec.map.producers)
        if map.num_layers != spec.map.num_layers or set(range(map.num_layers)) - owners:
            rule = "every layer of the source must own its keys and values, as many as in the map"
            fix = "start from a model without sharing, of the same depth"
            raise MapError(Fault("--kv-pattern", map.notation, rule, fix))
        shapes = replace(spec, map=map).weight_shapes
        self.tensors = {
            name: TensorInfo(shape, source.tensors[name].dtype) for name, shape in shapes.items()
        }
        self._alignment = lru_cache(maxsize=None)(self._align)

    def read(self, name: str) -> torch.Tensor:
        layer, _, kind = name.removeprefix("model.layers.").partition(".")
        part = kind.removeprefix("self_attn.").removesuffix("_proj.weight")
        if not kind.startswith("self_attn.") or self.init is KVInit.TARGET:
            return self.source.read(name)
        number = int(layer)
        if part in ("k", "v"):
            return self._shared(number, part).to(self.tensors[name].dtype)
        producer = self.map.sources[number]
        if self.init is not KVInit.ALIGNED or producer == number:
            return self.source.read(name)
        turned = self._turned(number, producer, part)
        return turned.to(self.tensors[name].dtype)

    def _shared(self, producer: int, part: str) -> torch.Tensor:
        readers = (producer, *self.map.consumers_of(producer))
        if self.init is KVInit.RANDOM:
            generator = torch.Generator().manual_seed(self.seed + 2 * producer + (part == "v"))
            like = self.weight(producer, part)
            return torch.empty_like(like).normal_(0.0, self.std, generator=generator)
        if self.init is KVInit.MEAN:
            parts = [self.weight(reader, part) for reader in readers]
        else:
            parts = [self.weight(producer, part)]
            parts += [self._turned(reader, producer, part) for reader in readers[1:]]
        return torch.stack(parts).mean(0)

    def weight(self, layer: int, part: str) -> torch.Tensor:
        """``W_Q``, ``W_K``, ``W_V`` or ``W_O`` in fp32."""
        return self.source.read(f"{layer_prefix(layer)}self_attn.{part}_proj.weight").float()

    def _turned(self, layer: int, producer: int, part: str) -> torch.Tensor:
        """The layer's own projection, its heads placed and turned towards the producer's."""
        how, weight = self._alignment(layer, producer), self.weight(layer, part)
        heads, width, order = self.shape.num_query_groups, self.shape.kv_channels, list(how.order)
        turn = how.keys if part in ("q", "k") else how.values
        if part == "o":  # [h, heads x d]: columns
            columns = weight.unflatten(1, (heads, -1, width))[:, order]
            return torch.einsum("hgnd,ged->hgne", columns, turn).flatten(1)
        rows = weight.unflatten(0, (heads, -1, width))[order]  # [g, heads of a group, d, h]
        return torch.einsum("ged,gndh->gneh", turn, rows).flatten(0, 2)

    def _align(self, layer: int, producer: int) -> _Alignment:
        keys = [self._heads(number, "k") for number in (layer, producer)]
        values = [self._heads(number, "v") for number in (layer, producer)]
        count = self.shape.num_query_groups
        found = {
            (i, j): (
                _best_rotation(keys[0][i], keys[1][j]),
                _procrustes(values[0][i], values[1][j]),
            )
            for i in range(count)
            for j in range(count)
        }
        likeness = torch.tensor(
            [[found[i, j][0][1] + found[i, j][1][1] for j in range(count)] for i in range(count)]
        )
        order = best_order(likeness)
        chosen = [found[i, j] for j, i in enumerate(order)]
        rotations = torch.stack([rotation for (rotation, _), _ in chosen])
        return _Alignment(order, rotations, torch.stack([turn for _, (turn, _) in chosen]))

    def _heads(self, layer: int, part: str) -> torch.Tensor:
        """``[g, d, h]``, the columns weighted as the layer's norm weights them."""
        norm = self.source.read(f"{layer_prefix(layer)}input_layernorm.weight").float()
        weight = self.weight(layer, part) * norm
        return weight.unflatten(0, (self.shape.num_query_groups, self.shape.kv_channels))


def _best_rotation(head: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The rotation ``[d, d]`` in the rotary planes (row r with row r + d/2) that brings ``head``
    ``[d, h]`` closest to ``wanted``, and their likeness then, at most 1."""
    half = head.shape[0] // 2
    pairs = torch.complex(head[:half], head[half:])
    wanted_pairs = torch.complex(wanted[:half], wanted[half:])
    overlap = (pairs.conj() * wanted_pairs).sum(1)  # its angle turns the pair onto the wanted one
    angle = overlap.angle()
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    rotation = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
    return rotation, float(overlap.abs().sum() / (head.norm() * wanted.norm()).clamp(min=1e-30))


def _procrustes(head: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The orthogonal ``[d, d]`` matrix that brings ``head`` closest to ``wanted``, and their
    likeness."""
    left, scale, right = torch.linalg.svd(wanted @ head.T)
    return left @ right, float(scale.sum() / (head.norm() * wanted.norm()).clamp(min=1e-30))


def best_order(likeness: torch.Tensor) -> tuple[int, ...]:
    """Which row goes to which column, ``order[column] = row``, so that the sum is the largest."""
    graph = networkx.Graph()
    for row, entries in enumerate(likeness.tolist()):
        for column, entry in enumerate(entries):
            graph.add_edge(("row", row), ("column", column), weight=entry)
    pairs = networkx.max_weight_matching(graph, maxcardinality=True)
    row_of = {column: row for (_, column), (_, row) in map(sorted, pairs)}
    return tuple(row_of[column] for column in range(len(likeness)))
