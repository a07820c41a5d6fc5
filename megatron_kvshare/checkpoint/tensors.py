"""Named tensors on disk, read one at a time: of a native checkpoint, on any layout, by one
process and without starting any ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_kvshare.checkpoint.metadata import read_metadata
from megatron_kvshare.checkpoint.parts import OPTIMIZER, RANDOM_STATE, single_parts
from megatron_kvshare.checkpoint.storage import read_parts


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
        read_parts(single_parts("", {name: whole}), self.folder, self._metadata)
        return whole


class NativeWeights(NativeTensors):
    """The weights among them; their names are those of Hugging Face's Llama."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tensors = {
            name: info
            for name, info in self.tensors.items()
            if not name.startswith((OPTIMIZER, RANDOM_STATE))
        }
