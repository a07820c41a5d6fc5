"""Saving a checkpoint: written aside, renamed when complete, announced in the tracker last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
    OptimizerState,
    Part,
    optimizer_parts,
    single_parts,
    weight_parts,
)
from megatron_kvshare.checkpoint.random_state import random_state
from megatron_kvshare.checkpoint.retention import KEEP_ALL, Keep, remove_superseded
from megatron_kvshare.checkpoint.storage import write_parts
from megatron_kvshare.errors import CheckpointError, Fault, OwnershipError
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.ownership.aside import remove

Check = Callable[[], None]
"""Raises OwnershipError where the folder has become another run's."""


def nobody_else() -> None:
    """The check of a folder that nobody else knows of."""


class Written(NamedTuple):
    """A complete checkpoint; ``warnings``: older ones that should have gone and are still there."""

    folder: Path
    warnings: Sequence[str]


def save_checkpoint(
    root: Path,
    manifest: Manifest,
    models: Sequence[KVShareGPT],
    optimizer: OptimizerState | None,
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
    models: Sequence[KVShareGPT], optimizer: OptimizerState | None, state: ParallelState
) -> list[Part]:
    """What this rank writes into a checkpoint: views of the memory that training goes on with."""
    parts = weight_parts(models, state)
    if optimizer is not None:
        parts += optimizer_parts(optimizer, models, state)
        count = torch.tensor([optimizer.updates])
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
    check: Check = nobody_else,
) -> Written:
    """Write the ``parts`` of all ranks as the checkpoint of the manifest's step; then ``keep`` says
    which older ones stay.

    All ranks call this; they talk in ``group``, None: the group of the job. ``check`` is asked on
    the first rank before anything is touched that has a name.

    Raises:
        CheckpointError: on all ranks; earlier checkpoints and the tracker are as they were.
        OwnershipError: the same, because ``check`` says that the folder is another run's.
    """
    step = manifest.progress.step
    target = folders.iteration_folder(root, step)
    once = partial(_on_first_rank, state=state, group=group)
    aside: Path | None = None
    try:
        aside = Path(once(lambda: _begin(target, check)))
        write_parts(parts, aside, group)
        marked = replace(manifest, files=mark_files(aside, state, group))
        once(lambda: _complete(marked, aside, target, check))
        warnings = once(lambda: _tidy(root, step, keep, check))
    except (OSError, OwnershipError) as error:  # not what communication raises: a lost rank
        if state.is_first and aside is not None:
            remove(aside)
        if isinstance(error, OwnershipError):
            raise
        fix = "free space or permissions there, or choose another --save folder"
        rule = f"it cannot be written: {error}"
        raise CheckpointError(Fault("--save", str(target), rule, fix)) from error
    return Written(target, warnings)


def _begin(target: Path, check: Check) -> str:
    check()
    return str(folders.begin(target))


def _complete(manifest: Manifest, aside: Path, target: Path, check: Check) -> None:
    manifest.write(aside)
    folders.flush(aside)
    check()
    folders.publish(aside, target, manifest.progress.step)


def _tidy(root: Path, step: int, keep: Keep, check: Check) -> list[str]:
    check()
    return remove_superseded(root, step, keep)


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
        except OwnershipError as error:
            outcome[1] = error.faults
    dist.broadcast_object_list(outcome, src=0, group=group)
    if isinstance(outcome[1], str):
        raise OSError(outcome[1])
    if outcome[1] is not None:
        raise OwnershipError(outcome[1])
    return outcome[0]
