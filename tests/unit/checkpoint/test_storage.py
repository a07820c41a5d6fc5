"""Memory that runs out while tensors go to or come from the disk is told as that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_kvshare.checkpoint.parts import Part
from megatron_kvshare.checkpoint.storage import read_parts, write_parts
from megatron_kvshare.megatron_api.parallel import ParallelState


class NoRoom(torch.Tensor):
    """There is no memory for a copy of it, nor to copy to it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.detach:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().__torch_function__(func, types, args, kwargs or {})


def part(data: torch.Tensor) -> list[Part]:
    return [Part("weight", (4,), (0,), data)]


def test_memory_that_runs_out_is_no_fault_of_the_disk(
    single: ParallelState, tmp_path: Path
) -> None:
    write_parts(part(torch.ones(4)), tmp_path, None)
    metadata = FileSystemReader(tmp_path).read_metadata()
    read = torch.zeros(4)
    read_parts(part(read), tmp_path, metadata)
    assert read.tolist() == [1, 1, 1, 1]
    without_room = part(torch.zeros(4).as_subclass(NoRoom))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        read_parts(without_room, tmp_path, metadata)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        write_parts(without_room, tmp_path / "other", None)
