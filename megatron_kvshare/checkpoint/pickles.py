"""The pickles in a checkpoint, read as data, never as code: torch's list of its tensors, and what
formats before 6 kept besides."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_kvshare.checkpoint.manifest import file_inside
from megatron_kvshare.errors import CheckpointError, Fault

METADATA = ".metadata"
COMMON = "common.pt"
"""Of formats before 6."""
Kind = TypeVar("Kind")

_DCP = "torch.distributed.checkpoint"
_DATA_ONLY = {
    f"{_DCP}.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_DCP}.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    f"{_DCP}.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "builtins": "getattr",  # by which some versions of Python store the member of an enum
}
"""What torch's description of a checkpoint names, besides types of numbers."""


class _Record:
    """One use of a name in the file: what it was called with, and the state it was given.

    It stands for torch's class or function, which the file never gets hold of: a pickle can set
    attributes of whatever it names, and a class of torch's would keep them.
    """

    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RecordUnpickler(pickle.Unpickler):
    """Builds plain data and records, of types made for this file alone; other names than torch's
    descriptions of tensors are refused."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _DATA_ONLY.get(module, "").split() or is_dtype:
            return type("record", (_Record,), {"name": name})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no description of data")


def read_metadata(folder: Path) -> Metadata:
    """The list of tensors of a checkpoint folder: where each lies in which of its files.

    Raises:
        CheckpointError: it is missing, damaged, would run code, or leads out of the folder.
    """
    try:
        with file_inside(folder, METADATA).open("rb") as file:
            record = _RecordUnpickler(file).load()
        return _metadata(record, folder)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(folder, f"its list of tensors cannot be read: {error}") from error


def damaged(folder: Path, rule: str) -> CheckpointError:
    """The error for a checkpoint that cannot be read."""
    return CheckpointError(
        Fault("checkpoint", str(folder), rule, "use another iter_* folder, or save it again")
    )


# Records to torch's classes: each value is of the type it must have, or the file is refused ------


def _metadata(record: Any, folder: Path) -> Metadata:
    """Without what only the writer needed (its plan, its names for folder and save)."""
    stored, at = _fields(record, "Metadata", "state_dict_metadata", "storage_data")
    places = {_index(key): _place(each) for key, each in _of(at, dict).items()}
    for name in {place.relative_path for place in places.values()}:
        file_inside(folder, name)
    tensors = {_of(name, str): _stored(each) for name, each in _of(stored, dict).items()}
    return Metadata(tensors, storage_data=places)


def _stored(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _is(record, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    properties, size, chunks = _fields(
        record, "TensorStorageMetadata", "properties", "size", "chunks"
    )
    boxes = [
        _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes") for chunk in _of(chunks, list)
    ]
    return TensorStorageMetadata(
        TensorProperties(dtype=_dtype(properties)),
        _size(size),
        [ChunkStorageMetadata(_size(offsets), _size(sizes)) for offsets, sizes in boxes],
    )


def _index(record: Any) -> MetadataIndex:
    """Without the position in a list of chunks, which only makes torch's search shorter."""
    (name,) = _fields(record, "MetadataIndex", "fqn")
    offset = record.state.get("offset")
    return MetadataIndex(_of(name, str), None if offset is None else _size(offset))


def _place(record: Any) -> _StorageInfo:
    name, offset, length = _fields(record, "_StorageInfo", "relative_path", "offset", "length")
    if record.state.get("transform_descriptors"):
        raise ValueError("tensors are stored in another encoding than torch's own")
    return _StorageInfo(_of(name, str), _whole(offset), _whole(length))


def _dtype(record: Any) -> torch.dtype:
    if not _is(record, "TensorProperties"):
        raise ValueError("it describes a tensor by something else")
    kind = _of(record.state, tuple)[0]
    # A type of numbers is named and not called.
    if not (isinstance(kind, type) and issubclass(kind, _Record)):
        raise ValueError("it describes a tensor without its type of numbers")
    return _of(getattr(torch, kind.name), torch.dtype)


def _size(record: Any) -> torch.Size:
    if not _is(record, "Size"):
        raise ValueError("it gives a shape by something else")
    (lengths,) = record.args
    return torch.Size(_whole(length) for length in _of(lengths, tuple))


def _fields(record: Any, name: str, *fields: str) -> list[Any]:
    if not _is(record, name):
        raise ValueError(f"it holds something else in place of {name}")
    state = _of(record.state, dict)
    missing = [field for field in fields if field not in state]
    if missing:
        raise ValueError(f"a {name} says nothing of {', '.join(missing)}")
    return [state[field] for field in fields]


def _is(record: Any, name: str) -> bool:
    return isinstance(record, _Record) and record.name == name


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("it gives a place or a length that is no whole number from 0 on")
    return value


def _of(value: Any, kind: type[Kind]) -> Kind:
    if type(value) is not kind:
        raise ValueError(f"it holds something else in place of {kind.__name__}")
    return value


# Formats before 6, which megatron-core wrote ------------------------------------------------------


def older_updates(folder: Path) -> int:
    """How many updates the optimizer state has seen, by ``common.pt``.

    Raises:
        CheckpointError: it is not there, or the file would run code.
    """
    try:
        common = torch.load(file_inside(folder, COMMON), map_location="cpu", weights_only=True)
        stored = common["optimizer"]
        stored = stored.get("optimizer", stored)
        common_step = stored.get("state", {}).get("common_step")
        return int(stored["param_groups"][0]["step"] if common_step is None else common_step)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(folder, f"{COMMON} cannot be read as data: {error}") from error


def older_random_state(
    folder: Path, metadata: Metadata, rank: int, world_size: int
) -> dict[str, torch.Tensor]:
    """Generator states of one rank, stored as bytes among the tensors.

    Raises:
        CheckpointError: they are not there, or would run code.
    """
    name = f"random_state/shard_{rank}_{world_size}"
    try:
        place: Any = metadata.storage_data[MetadataIndex(name)]
        with file_inside(folder, place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        (states,) = torch.load(content, map_location="cpu", weights_only=True)
        return {str(name): torch.as_tensor(state) for name, state in states.items()}
    except Exception as error:
        raise damaged(folder, f"{name} cannot be read as data: {error}") from error
