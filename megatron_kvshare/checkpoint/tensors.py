"""The tensors of a checkpoint by name: whole, with their true shapes, whoever wrote them and from
however many ranks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_kvshare.checkpoint.deepspeed_shards import KINDS, WEIGHT, Shards, read_shards
from megatron_kvshare.checkpoint.manifest import Manifest
from megatron_kvshare.checkpoint.parts import OPTIMIZER, RANDOM_STATE, Part, single_parts
from megatron_kvshare.checkpoint.pickles import damaged, read_metadata
from megatron_kvshare.checkpoint.storage import read_parts
from megatron_kvshare.megatron_api.optimizer_state import MAIN
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.model.parameters import Piece, pieces_of
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.stages.placement import Placement


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource(Protocol):
    """Tensors by name, read when asked for."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> torch.Tensor: ...


class StoredTensors(TensorSource, Protocol):
    """Those of a checkpoint, weights and optimizer state."""

    def fill(self, parts: Sequence[Part]) -> None:
        """Copy into ``parts``, wherever in their tensors they lie.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or cannot be read.
        """
        ...


class NativeTensors:
    """All tensors of a checkpoint folder ``iter_*``, whole and with their true shapes.

    Raises:
        CheckpointError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        self.fill(single_parts("", {name: whole}))
        return whole

    def fill(self, parts: Sequence[Part]) -> None:
        read_parts(parts, self.folder, self._metadata)


class _Place(NamedTuple):
    """Where a piece of a full tensor lies: in which parameter of a tensor-parallel rank."""

    shards: Shards
    parameter: str
    piece: Piece


class DeepSpeedTensors:
    """The same of a folder ``global_step*``, under the same names. Weights of a bf16 run are its
    fp32 weights, rounded as training rounds them.

    Raises:
        CheckpointError: files are missing or damaged, or hold another model.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._folder = folder
        self._places = _places(folder, spec)
        dtype = torch.bfloat16 if spec.model.bf16 else torch.float32
        moments = [kind for kind in KINDS if kind != WEIGHT]
        self._kinds = {f"{OPTIMIZER}state.{kind}.": kind for kind in moments}
        if spec.model.bf16:
            self._kinds[f"{OPTIMIZER}state.{MAIN}."] = WEIGHT
        weights = {weight.name: TensorInfo(weight.shape, dtype) for weight in spec.weights}
        self.tensors: dict[str, TensorInfo] = dict(weights)
        for prefix, (name, info) in itertools.product(self._kinds, weights.items()):
            self.tensors[prefix + name] = info._replace(dtype=torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        prefix = next(filter(name.startswith, self._kinds), "")
        info, kind = self.tensors[name], self._kinds.get(prefix, WEIGHT)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for shards, parameter, piece in self._places[name.removeprefix(prefix)]:
            piece.of_full(whole).copy_(piece.of_local(shards.read(parameter, kind)))
        return whole

    def fill(self, parts: Sequence[Part]) -> None:
        for name, of_tensor in itertools.groupby(parts, key=lambda part: part.name):
            if name not in self.tensors:
                raise damaged(self._folder, f"the tensor {name} is missing")
            whole = self.read(name)
            for part in of_tensor:
                if part.shape != whole.shape:
                    rule = f"the tensor {name} has the shape {tuple(whole.shape)}, not {part.shape}"
                    raise damaged(self._folder, rule)
                sizes = zip(part.offset, part.data.shape, strict=True)
                part.data.copy_(whole[tuple(slice(first, first + size) for first, size in sizes)])


def _places(folder: Path, spec: ModelSpec) -> dict[str, list[_Place]]:
    """Of every full tensor all pieces, once."""
    ranks = read_shards(folder)
    (stage,) = Placement.whole(spec.map).stages
    wanted = {weight.parameter_on(stage) for weight in spec.weights_on(stage)}
    places: dict[str, list[_Place]] = {}
    for rank, shards in enumerate(ranks):
        shapes = {name: held.shape for name, held in shards.parameters.items()}
        if shapes.keys() != wanted:
            differing = ", ".join(sorted(shapes.keys() ^ wanted)[:3])
            raise damaged(folder, f"its parameters are not those of its model: {differing}")
        heads = HeadLayout.of(spec.model, rank, len(ranks))
        for parameter, pieces in pieces_of(spec, stage, shapes, heads).items():
            for piece in pieces:
                known = places.setdefault(piece.name, [])
                if piece.dim is not None or not known:  # else every rank holds the same
                    known.append(_Place(shards, parameter, piece))
    return places


def stored_tensors(folder: Path, manifest: Manifest) -> StoredTensors:
    """The tensors of the checkpoint in ``folder``, which has this ``manifest``.

    Raises:
        CheckpointError: the folder is damaged.
    """
    if manifest.layout == "native":
        return NativeTensors(folder)
    spec = ModelSpec.of_identity(manifest.identity, manifest.config)
    return DeepSpeedTensors(folder, spec)


class StoredWeights:
    """The weights among them; their names are those of Hugging Face's Llama."""

    def __init__(self, stored: StoredTensors) -> None:
        self.read = stored.read
        self.tensors = {
            name: info
            for name, info in stored.tensors.items()
            if not name.startswith((OPTIMIZER, RANDOM_STATE))
        }
