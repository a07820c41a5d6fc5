"""What checkpoints before format 6 kept as pickled objects: read as data, never as code.

They were written by megatron-core: the number of updates is in ``common.pt``, each rank's random
state in bytes among its tensors, and the distributed optimizer called its fp32 weights ``param``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_kvshare.checkpoint.folder import file_inside
from megatron_kvshare.checkpoint.metadata import damaged

COMMON = "common.pt"


def updates(folder: Path) -> int:
    """How many updates the optimizer state has seen.

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


def random_state(
    folder: Path, metadata: Metadata, rank: int, world_size: int
) -> dict[str, torch.Tensor]:
    """Generator states of one rank.

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
