"""torch's list of what a checkpoint holds (L4), read so that it runs nobody's code."""

from __future__ import annotations

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_kvshare.errors import CheckpointError, Fault

METADATA = ".metadata"

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


def read_metadata(folder: Path) -> Metadata:
    """The list of tensors of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, damaged, or would run code.
    """
    try:
        with (folder / METADATA).open("rb") as file:
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
