"""Parts of tensors to and from the disk, by torch's distributed checkpoint.

The files are those that megatron-core's ``torch_dist`` format has: ``.metadata`` and
``__<rank>_0.distcp``. megatron-core's own entry points are not used: they unpickle whatever a
folder holds, write from forked copies of the training process, and finish a save in the way of the
training.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_kvshare.checkpoint.parts import Part
from megatron_kvshare.checkpoint.pickles import damaged
from megatron_kvshare.megatron_api.memory import shortage


def write_parts(parts: Sequence[Part], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the parts of all ranks of ``group`` (None: of the job) into ``folder``; all call this.

    Every element of every tensor must be written by exactly one rank; torch checks that.

    Raises:
        OSError: on every rank, if it fails on one.
        Exception: what says that memory ran out, on the rank where it did.
    """
    try:
        torch_checkpoint.save(
            {},
            storage_writer=_Writer(folder, per_thread_copy_ahead=0),
            planner=_WritePlanner(parts),
            process_group=group,
        )
    except CheckpointException as error:  # no Exception: a collection of what every rank met
        _raise_shortage(error, dist.get_rank(group))
        raise OSError(_first_reason(error)) from error


def read_parts(parts: Sequence[Part], folder: Path, metadata: Metadata) -> None:
    """Fill ``parts`` from ``folder``; every rank reads for itself.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the files are damaged.
        Exception: what says that memory ran out.
    """
    for part in parts:
        _check(part, folder, metadata)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            torch_checkpoint.load(
                {},
                storage_reader=_Reader(folder, metadata),
                planner=_ReadPlanner(parts),
                no_dist=True,
            )
    except CheckpointException as error:
        _raise_shortage(error, 0)  # read without the others, torch numbers it 0
        raise damaged(folder, f"its tensors cannot be read: {_first_reason(error)}") from error


def _raise_shortage(error: CheckpointException, rank: int) -> None:
    """Memory that ran out is no fault of the disk or of what is on it."""
    mine = error.failures.get(rank)
    if mine is not None and shortage(mine[0]):
        raise mine[0] from None


def _first_reason(error: CheckpointException) -> str:
    first = next(iter(error.failures.values()))[0]
    return f"{type(first).__name__}: {first}"


def _check(part: Part, folder: Path, metadata: Metadata) -> None:
    stored = metadata.state_dict_metadata.get(part.name)
    if not isinstance(stored, TensorStorageMetadata):
        raise damaged(folder, f"the tensor {part.name} is missing")
    if tuple(stored.size) != part.shape:
        rule = f"the tensor {part.name} has the shape {tuple(stored.size)}, not {part.shape}"
        raise damaged(folder, rule)


def _box(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offset), part.data.size())


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's writer; its list of tensors names no folder and no save, so that equal states give
    equal lists."""

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """torch reports a full disk as a position that it did not expect: tell what happened."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or error from None


class _WritePlanner(torch_checkpoint.DefaultSavePlanner):
    """Parts of this rank instead of a state dict; the rest is torch's, checks included."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = {MetadataIndex(each.name, each.offset): each for each in parts if each.ours}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_box(part),
                        properties=TensorProperties.create_from_tensor(part.data),
                        size=torch.Size(part.shape),
                    ),
                )
                for index, part in self._parts.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._parts[index].data


class _Reader(torch_checkpoint.FileSystemReader):
    """torch's reader, with metadata that is already read, and read safely."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._known


class _ReadPlanner(torch_checkpoint.DefaultLoadPlanner):
    """Reads the boxes of tensors that parts ask for, from whatever boxes are stored."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(
            [item for number in range(len(self._parts)) for item in self._reads(number)]
        )

    def _reads(self, number: int) -> list[ReadItem]:
        part = self._parts[number]
        stored = self.metadata.state_dict_metadata[part.name]
        items = create_read_items_for_chunk_list(part.name, stored, [_box(part)])
        found = sum(item.lengths.numel() for item in items)
        if found != part.data.numel():
            raise ValueError(
                f"{found:,} elements of {part.data.numel():,} of {part.name} are there"
            )
        # The index finds the part again: two may ask for the same box of a tensor.
        return [replace(item, dest_index=replace(item.dest_index, index=number)) for item in items]

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        assert index.index is not None
        return self._parts[index.index].data
