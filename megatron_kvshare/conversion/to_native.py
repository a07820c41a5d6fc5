"""A checkpoint that DeepSpeed has written -> a native one, optimizer state included: in one
process, without DeepSpeed and without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_kvshare.checkpoint.parts import Part, single_parts
from megatron_kvshare.checkpoint.pickles import damaged
from megatron_kvshare.checkpoint.reader import StoredModel
from megatron_kvshare.checkpoint.save import Content, write_checkpoint
from megatron_kvshare.checkpoint.tensors import NativeTensors, StoredTensors, stored_tensors
from megatron_kvshare.conversion.export import written_aside
from megatron_kvshare.megatron_api.parallel import ParallelState


class Rewritten(NamedTuple):
    """``folder``: the new checkpoint, of which ``tensors`` were compared."""

    folder: Path
    tensors: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors are those of the original, bit by bit"


def to_native(stored: StoredModel, save: Path, state: ParallelState) -> Rewritten:
    """Write ``stored`` as a native checkpoint into the folder ``save``; the whole state is in
    memory meanwhile (12 bytes per parameter, under bf16 14).

    Raises:
        CheckpointError: ``save`` is in the way or cannot be written, or ``stored`` is damaged.
    """
    original = stored_tensors(stored.folder, stored.manifest)
    # Generators and the count of updates are in our own form, whoever has written the rest.
    beside = NativeTensors(stored.folder)
    sources: dict[str, StoredTensors] = {
        **dict.fromkeys(beside.tensors, beside),
        **dict.fromkeys(original.tensors, original),
    }
    manifest = replace(stored.manifest, tensor_parallel=1, data_parallel=1, pipeline_parallel=1)
    parts: list[Part] = []
    for name, source in sources.items():
        parts += single_parts("", {name: source.read(name)})
    with written_aside(save) as aside:
        written = write_checkpoint(aside, manifest, Content(parts), state)
        _prove(sources, written.folder)
    return Rewritten(save / written.folder.name, len(sources))


def _prove(sources: dict[str, StoredTensors], folder: Path) -> None:
    """Raise :class:`CheckpointError` unless the new files hold the old tensors."""
    found = NativeTensors(folder)
    for name, source in sources.items():
        if name not in found.tensors or not torch.equal(found.read(name), source.read(name)):
            raise damaged(folder, f"the tensor {name} is not what was written")
