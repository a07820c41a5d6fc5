"""Saving a checkpoint (L4): written aside, renamed when complete, announced in the tracker last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.integrity import mark_files
from megatron_kvshare.checkpoint.manifest import Manifest
from megatron_kvshare.checkpoint.parts import (
    RANDOM_STATE,
    UPDATES,
    Part,
    optimizer_parts,
    single_parts,
    weight_parts,
)
from megatron_kvshare.checkpoint.random_state import random_state
from megatron_kvshare.checkpoint.retention import KEEP_ALL, Keep, remove_superseded
from megatron_kvshare.checkpoint.storage import write_parts
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.optimizer import MegatronOptimizer
from megatron_kvshare.megatron_api.optimizer_state import updates
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT


class Written(NamedTuple):
    """A complete checkpoint; ``warnings``: older ones that should have gone and are still there."""

    folder: Path
    warnings: Sequence[str]


def save_checkpoint(
    root: Path,
    manifest: Manifest,
    models: Sequence[KVShareGPT],
    optimizer: MegatronOptimizer | None,
    state: ParallelState,
) -> Path:
    """Save the weights of ``models``, this rank's pipeline stages, ``optimizer`` (None: leave it
    out) and random state; all ranks call this.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: on all ranks; it could not be written, earlier checkpoints are intact.
    """
    return write_checkpoint(root, manifest, content(models, optimizer, state), state).folder


def content(
    models: Sequence[KVShareGPT], optimizer: MegatronOptimizer | None, state: ParallelState
) -> list[Part]:
    """What this rank writes into a checkpoint: views of the memory that training goes on with."""
    parts = weight_parts(models, state)
    if optimizer is not None:
        parts += optimizer_parts(optimizer, models, state)
        count = torch.tensor([updates(optimizer)])
        parts += single_parts("", {UPDATES: count}, ours=state.is_first)
    generators = random_state(state.platform.device)
    parts += single_parts(f"{RANDOM_STATE}{state.rank}.", generators)
    return [part for part in parts if part.ours]


def write_checkpoint(
    root: Path,
    manifest: Manifest,
    parts: Sequence[Part],
    state: ParallelState,
    group: dist.ProcessGroup | None = None,
    keep: Keep = KEEP_ALL,
) -> Written:
    """Write the ``parts`` of all ranks as the checkpoint of the manifest's step; then ``keep`` says
    which older ones stay.

    All ranks call this; they talk in ``group``, None: the group of the job.

    Raises:
        CheckpointError: on all ranks; earlier checkpoints and the tracker are as they were.
    """
    step = manifest.progress.step
    target = folders.iteration_folder(root, step)
    try:
        aside = Path(_on_first_rank(lambda: str(folders.begin(target)), state, group))
        write_parts(parts, aside, group)
        marked = replace(manifest, files=mark_files(aside, state, group))
        _on_first_rank(lambda: _complete(marked, aside, target), state, group)
        warnings = _on_first_rank(lambda: remove_superseded(root, step, keep), state, group)
    except OSError as error:  # not what communication raises: that is a lost rank
        if state.is_first:
            folders.discard(target)
        fix = "free space or permissions there, or choose another --save folder"
        rule = f"it cannot be written: {error}"
        raise CheckpointError(Fault("--save", str(target), rule, fix)) from error
    return Written(target, warnings)


def _complete(manifest: Manifest, aside: Path, target: Path) -> None:
    manifest.write(aside)
    folders.flush(aside)
    folders.publish(aside, target, manifest.progress.step)


def _on_first_rank(
    action: Callable[[], Any], state: ParallelState, group: dist.ProcessGroup | None
) -> Any:
    """Run ``action`` on rank 0 and return its result, or raise its failure, on every rank."""
    outcome: list[Any] = [None, None]
    if state.is_first:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise OSError(outcome[1])
    return outcome[0]
