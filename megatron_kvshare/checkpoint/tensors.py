"""Named tensors on disk, read one at a time (L4): of a native checkpoint, on any layout, by one
process and without starting any ranks."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_kvshare.errors import CheckpointError, Fault


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


class NativeWeights:
    """The weights of a checkpoint folder ``iter_*``: full tensors with their true shapes.

    Their names are those of Hugging Face's Llama, whatever layout wrote them.

    Raises:
        CheckpointError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_metadata(folder)
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not name.startswith("optimizer.")
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        info = self.tensors[name]
        wanted = {name: torch.empty(info.shape, dtype=info.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                torch_checkpoint.load(
                    wanted, storage_reader=_KnownMetadata(self.folder, self._metadata), no_dist=True
                )
        except CheckpointException as error:  # no Exception: a collection of what every rank met
            reason = next(iter(error.failures.values()))[0]
            raise damaged(self.folder, f"tensor {name} cannot be read: {reason!r}") from error
        return wanted[name]


class _KnownMetadata(torch_checkpoint.FileSystemReader):
    """torch's reader, with metadata that is already read, and read safely."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._known


_DCP = "torch.distributed.checkpoint"
_DATA_ONLY = {
    f"{_DCP}.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_DCP}.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    f"{_DCP}.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
}
"""The classes in which torch describes what a checkpoint holds; none of them does anything."""


def _member(kind: Any, name: str) -> Any:
    """What ``getattr`` may do here: some versions of Python store a member of an enum by it."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for the attribute {name} of {kind}")


class _DataUnpickler(pickle.Unpickler):
    """Builds plain data and torch's descriptions of tensors; anything else a file names is refused,
    so that opening somebody's checkpoint runs none of its code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _DATA_ONLY.get(module, "").split() or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no description of data")


def _read_metadata(folder: Path) -> Metadata:
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _DataUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(folder, f"its list of tensors cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise damaged(folder, "its list of tensors holds something else")
    return metadata


def damaged(folder: Path, rule: str) -> CheckpointError:
    """The error for a checkpoint that cannot be read."""
    return CheckpointError(
        Fault("checkpoint", str(folder), rule, "use another iter_* folder, or save it again")
    )
