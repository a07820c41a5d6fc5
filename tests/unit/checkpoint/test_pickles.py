"""The pickles of somebody's checkpoint, its list of tensors above all: they run nothing, change
nothing in this process and lead nowhere but to files of its folder."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_kvshare.checkpoint.integrity import mark, problems
from megatron_kvshare.checkpoint.manifest import file_inside
from megatron_kvshare.checkpoint.parts import single_parts
from megatron_kvshare.checkpoint.pickles import METADATA, older_random_state, read_metadata
from megatron_kvshare.checkpoint.storage import read_parts, write_parts
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.megatron_api.parallel import ParallelState

WEIGHT = torch.arange(12.0).view(3, 4)


@pytest.fixture
def folder(single: ParallelState, tmp_path: Path) -> Path:
    """A checkpoint of two tensors beside another one, whose numbers are secret."""
    for name, factor in (("mine", 1), ("secret", -1)):
        weights = {"a": factor * WEIGHT, "b": factor * WEIGHT.bfloat16()}
        write_parts(single_parts("", weights), tmp_path / name, None)
    return tmp_path / "mine"


def read(folder: Path) -> torch.Tensor:
    weight = torch.zeros(3, 4)
    read_parts(single_parts("", {"a": weight}), folder, read_metadata(folder))
    return weight


def test_what_torch_wrote_is_read_whole(folder: Path) -> None:
    theirs: Metadata = pickle.loads((folder / METADATA).read_bytes())
    mine = read_metadata(folder)
    assert mine.state_dict_metadata == theirs.state_dict_metadata
    assert mine.storage_data == theirs.storage_data
    assert torch.equal(read(folder), WEIGHT)


def test_objects_beside_tensors_are_listed(folder: Path) -> None:
    metadata = read_metadata(folder)
    metadata.state_dict_metadata["rng"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("rng")] = metadata.storage_data[MetadataIndex("a", (0, 0))]
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    again = read_metadata(folder)
    assert again.state_dict_metadata == metadata.state_dict_metadata
    assert again.storage_data == metadata.storage_data


# Paths ------------------------------------------------------------------------------------------

FILE = "__0_0.distcp"
PATHS: dict[str, Callable[[Path], str]] = {
    "above": lambda folder: f"../secret/{FILE}",
    "absolute": lambda folder: str(folder.parent / "secret" / FILE),
    "through a folder": lambda folder: f"x/../{FILE}",
    "by a linked folder": lambda folder: f"link/{FILE}",
    "by a link": lambda folder: "out.distcp",
    "by a link to a link": lambda folder: "twice.distcp",
    "nowhere": lambda folder: "",
    "the folder": lambda folder: ".",
    "NUL": lambda folder: f"{FILE}\0",
    "a path of Windows": lambda folder: f"..\\secret\\{FILE}",
}


def links(folder: Path) -> None:
    (folder / "x").mkdir()
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "out.distcp").symlink_to(folder.parent / "secret" / FILE)
    (folder / "twice.distcp").symlink_to("out.distcp")


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_tensor_lies_in_a_file_of_the_folder(path: Callable[[Path], str], folder: Path) -> None:
    links(folder)
    metadata: Metadata = pickle.loads((folder / METADATA).read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = path(folder)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"file in the folder|out of the folder"):
        read(folder)


def test_so_do_marked_files_and_random_states(folder: Path) -> None:
    outside = f"../secret/{FILE}"
    assert problems(folder, {FILE: mark(folder / FILE)}) == []
    (line,) = problems(folder, {outside: mark(folder / outside)})
    assert "is not the name of a file in the folder" in line
    metadata = read_metadata(folder)
    place = metadata.storage_data[MetadataIndex("a", (0, 0))]
    place.relative_path = outside
    metadata.storage_data[MetadataIndex("random_state/shard_0_1")] = place
    with pytest.raises(CheckpointError, match="is not the name of a file in the folder"):
        older_random_state(folder, metadata, 0, 1)


def test_links_within_the_folder_and_to_it_are_followed(folder: Path) -> None:
    (folder / FILE).rename(folder / "stored")
    (folder / FILE).symlink_to("stored")
    (folder.parent / "again").symlink_to(folder)
    assert torch.equal(read(folder.parent / "again"), WEIGHT)
    assert file_inside(folder, FILE).is_file()


# Pickles ----------------------------------------------------------------------------------------

_DCP = "torch.distributed.checkpoint"


def build(module: str, name: str, state: Any) -> bytes:
    """A pickle of a global with a state, as only hands write it."""
    inner = pickle.dumps(state, 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + inner + b"b."


class OnMember:
    """The member of an enum, with an attribute more."""

    def __reduce__(self) -> Any:
        return getattr, (WriteItemType, "SHARD"), (None, {"planted": True})


PLANTED = (None, {"planted": True})
STATES: dict[str, bytes] = {
    "a class": build(f"{_DCP}.metadata", "Metadata", PLANTED),
    "how a class is restored": build(f"{_DCP}.metadata", "TensorProperties", PLANTED),
    "a function": build("torch.serialization", "_get_layout", PLANTED),
    "our function": build("builtins", "getattr", {"planted": True}),
    "a class of torch": build("torch", "Size", {"planted": True}),
    "a member of an enum": pickle.dumps(OnMember()),
}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES.keys())
def test_nothing_that_outlives_the_reading_is_changed(content: bytes, folder: Path) -> None:
    from megatron_kvshare.checkpoint import pickles

    (folder / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metadata(folder)
    ours = [value for value in vars(pickles).values() if callable(value)]
    for thing in (Metadata, TensorProperties, WriteItemType.SHARD, torch.Size, *ours):
        assert not hasattr(thing, "planted"), thing
    assert not hasattr(torch.serialization._get_layout, "planted")


def tampered(edit: Callable[[Metadata], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        metadata: Metadata = pickle.loads((folder / METADATA).read_bytes())
        edit(metadata)
        (folder / METADATA).write_bytes(pickle.dumps(metadata))

    return change


def every(**values: Any) -> Callable[[Metadata], object]:
    return lambda metadata: [vars(each).update(values) for each in metadata.storage_data.values()]


def tensor(**values: Any) -> Callable[[Metadata], object]:
    return lambda metadata: vars(metadata.state_dict_metadata["a"]).update(values)


TYPES: dict[str, Callable[[Metadata], object]] = {
    "a place before the file": every(offset=-1),
    "a place between bytes": every(offset=0.5),
    "a length that is a truth": every(length=True),
    "a path in bytes": every(relative_path=b"__0_0.distcp"),
    "no path": lambda metadata: [vars(each).clear() for each in metadata.storage_data.values()],
    "another encoding": every(transform_descriptors=["zstd"]),
    "a shape of text": tensor(size="34"),
    "a negative shape": tensor(size=torch.Size([-3, 4])),
    "no chunks": tensor(chunks=None),
    "a list of nothing": lambda metadata: vars(metadata).update(state_dict_metadata=None),
    "nowhere": lambda metadata: vars(metadata).update(storage_data=[]),
    "no properties": tensor(properties=BytesStorageMetadata()),
}


@pytest.mark.parametrize("edit", TYPES.values(), ids=TYPES.keys())
def test_values_of_other_types_are_refused(edit: Any, folder: Path) -> None:
    tampered(edit)(folder)
    with pytest.raises(CheckpointError, match="its list of tensors cannot be read: "):
        read_metadata(folder)
