"""Loading a checkpoint: found, compared with the run, read on any layout and by any
optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.integrity import problems_of_all
from megatron_kvshare.checkpoint.manifest import (
    Manifest,
    NewerFormat,
    Progress,
    check_identity,
    read_manifest,
)
from megatron_kvshare.checkpoint.parts import (
    OPTIMIZER,
    RANDOM_STATE,
    UPDATES,
    OptimizerState,
    Part,
    optimizer_parts,
    set_random_state,
    single_parts,
    weight_parts,
)
from megatron_kvshare.checkpoint.pickles import older_random_state, older_updates, read_metadata
from megatron_kvshare.checkpoint.storage import read_parts
from megatron_kvshare.checkpoint.tensors import stored_tensors
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.optimizer_state import MAIN
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT

_MAIN = f"{OPTIMIZER}state.{MAIN}."


@dataclass(frozen=True)
class Found:
    """A checkpoint that fits the run, and which of its parts to take."""

    folder: Path
    manifest: Manifest
    take_optimizer: bool
    take_random_state: bool
    progress: Progress
    stays: Path | None
    """The folder again where the run saves beside it, None where it saves elsewhere."""


class Newest(NamedTuple):
    """The iteration to load, None without one; ``warnings``: what was passed over, and why."""

    iteration: int | None
    warnings: tuple[str, ...] = ()


Promises = Callable[[], list[str]]
"""What else says that there were checkpoints in a folder, a line for each."""


def chosen(
    settings: CheckpointConfig, state: ParallelState, promises: Promises = list
) -> CheckpointConfig:
    """The settings with ``--resume auto`` carried out; all ranks call this. ``promises`` are asked
    for on the first rank, where no checkpoint can be found.

    Raises:
        CheckpointError: the run would write over checkpoints of another one, or start over although
            there were checkpoints.
    """
    if settings.save is None:
        return settings
    root = Path(settings.save)
    if not _candidates(root, state).iterations:
        if settings.resume == "auto":
            _check_nothing_was_there(root, state, promises)
        return settings
    if settings.resume == "auto":
        whole = {"finetune": False, "no_load_optim": False, "no_load_rng": False, "ckpt_step": None}
        return replace(settings, load=settings.save, **whole)
    goes_on = settings.load is not None and Path(settings.load).resolve() == root.resolve()
    if not goes_on or settings.finetune:
        rule = "it holds checkpoints of another run, which this one would write over"
        fix = "add --resume auto to go on from them, or choose another folder"
        raise CheckpointError(Fault("--save", settings.save, rule, fix))
    return settings


def newest_sound(settings: CheckpointConfig, state: ParallelState) -> Newest:
    """The newest checkpoint of ``--load`` of which every byte is as it was written.

    All ranks call this, each reads its share of the files; all get the same answer.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    if settings.load is None:
        return Newest(None)
    root = Path(settings.load)
    iterations, complaint = _candidates(root, state, settings.ckpt_step)
    damaged = [] if complaint is None else [complaint]
    for iteration in iterations:
        folder = folders.iteration_folder(root, iteration)
        try:
            reasons = problems_of_all(folder, read_manifest(folder).files, state)
        except NewerFormat:
            raise
        except CheckpointError as error:  # on every rank: all read the same manifest
            reasons = [f"{error.faults[0].where}: {error.faults[0].value}"]
        if not reasons:
            return Newest(iteration, tuple(damaged))
        damaged.append(f"{folder} is damaged and left out: {'; '.join(reasons[:3])}")
    if iterations:
        rule = f"no checkpoint in it is as it was written. {' '.join(damaged)}"
        fix = "restore one from a backup, or start fresh with another --save folder"
        raise CheckpointError(Fault("--load", settings.load, rule, fix))
    if complaint is not None:
        fix = "bring the checkpoints back (is the disk there?), or give another folder"
        rule = f"there is no checkpoint in it. {complaint}"
        raise CheckpointError(Fault("--load", settings.load, rule, fix))
    return Newest(None)


def _check_nothing_was_there(root: Path, state: ParallelState, promises: Promises) -> None:
    found = _seen_by_first(lambda: [*folders.traces(root), *promises()], root, state)
    if not found:
        return
    rule = f"--resume auto finds no checkpoint in it, but there was one: {'; '.join(found)}"
    fix = (
        "bring the checkpoints back (is the disk there?); to start over all the same, remove what"
        " is named here or start once without --resume auto"
    )
    raise CheckpointError(Fault("--save", str(root), rule, fix))


def _candidates(root: Path, state: ParallelState, step: int | None = None) -> folders.Candidates:
    return folders.Candidates(*_seen_by_first(lambda: folders.candidates(root, step), root, state))


def _seen_by_first(look: Callable[[], Any], root: Path, state: ParallelState) -> Any:
    """What the first rank sees, for all: file systems may show them different things.

    Raises:
        CheckpointError: on all ranks, where it cannot see.
    """
    outcome: list[Any] = [None, None]
    if state.is_first:
        try:
            outcome[0] = look()
        except CheckpointError as error:
            outcome[1] = error.faults
        except OSError as error:
            fix = "see that its disk is there and that you may read it"
            outcome[1] = Fault("--save", str(root), f"it cannot be read: {error}", fix)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def find_checkpoint(
    settings: CheckpointConfig,
    identity: dict[str, Any],
    world_size: int,
    iteration: int | None,
) -> Found | None:
    """Check that checkpoint ``iteration`` of ``--load`` fits the run; None means start fresh.

    Does not communicate.

    Raises:
        CheckpointError: nothing to load, or it belongs to another map, model or vocabulary.
    """
    if settings.load is None:
        return None
    root = Path(settings.load)
    if iteration is None:
        rule = f"there is no checkpoint in it (no {folders.TRACKER})"
        fix = "give the --save folder of an earlier run, or drop --load to start fresh"
        if settings.load == settings.save:
            fix = "write --resume auto instead: it starts fresh where there is no checkpoint yet"
        raise CheckpointError(Fault("--load", settings.load, rule, fix))
    folder = folders.iteration_folder(root, iteration)
    manifest = read_manifest(folder)
    check_identity(manifest, identity, settings.finetune)
    take_optimizer = not (settings.no_load_optim or settings.finetune)
    if take_optimizer and not manifest.has_optimizer:
        rule = "it was saved without optimizer state"
        fix = "add --no-load-optim to continue without it, or --finetune to start from step 0"
        raise CheckpointError(Fault("--load", str(folder), rule, fix))
    ranks = manifest.tensor_parallel * manifest.pipeline_parallel * manifest.data_parallel
    same_world = ranks == world_size
    return Found(
        folder,
        manifest,
        take_optimizer,
        take_random_state=same_world and not (settings.no_load_rng or settings.finetune),
        progress=_progress(manifest.progress, settings),
        stays=folder if settings.load == settings.save and not settings.finetune else None,
    )


def _progress(stored: Progress, settings: CheckpointConfig) -> Progress:
    """Where a run begins that loads; only one that goes on in its own folder is still as fresh."""
    if settings.finetune:
        return Progress()
    if settings.load == settings.save:
        return stored
    return replace(stored, health=replace(stored.health, fresh=False))


def load_checkpoint(
    found: Found, models: Sequence[KVShareGPT], optimizer: OptimizerState, state: ParallelState
) -> None:
    """Fill ``models``, this rank's pipeline stages, and ``optimizer``; every rank reads for itself.

    Raises:
        CheckpointError: files are missing or damaged, or would run code.
    """
    tensors = stored_tensors(found.folder, found.manifest)
    parts = weight_parts(models, state)
    if found.take_optimizer:
        parts += optimizer_parts(optimizer, models, state)
    _clear(models, optimizer)
    names = tensors.tensors.keys()
    tensors.fill([_as_stored(part, names, found.take_optimizer) for part in parts])
    metadata = read_metadata(found.folder)
    if found.take_optimizer:
        optimizer.set_updates(_updates(found.folder, metadata))
    else:
        optimizer.follow_weights()
    restore_generators(found, state, metadata)


def restore_generators(
    found: Found, state: ParallelState, metadata: Metadata | None = None
) -> None:
    """Set the random number generators of this rank, where the checkpoint is to tell them;
    ``metadata``: of its folder, if it is known."""
    if found.take_random_state:
        metadata = metadata or read_metadata(found.folder)
        set_random_state(_random_state(found.folder, metadata, state), state.platform.device)


@torch.no_grad()
def _clear(models: Sequence[KVShareGPT], optimizer: OptimizerState) -> None:
    """Vocabulary padding is in no stored tensor: it is zero, in the optimizer's fp32 copies too."""
    for model in models:
        for weight in model.parameters():
            weight.zero_()
    optimizer.follow_weights()


def _as_stored(part: Part, names: Collection[str], take_optimizer: bool) -> Part:
    """``part`` under the name of the stored tensor that has its exact values.

    fp32 weights are stored once: as the weights themselves, or beside those of a bf16 run as
    ``fp32_param`` (``param`` before format 6, by the distributed optimizer). Whichever is there
    serves fp32 weights and the fp32 copies of bf16 ones.
    """
    weight = part.name.removeprefix(_MAIN)
    is_fp32_weight = not weight.startswith(OPTIMIZER) and part.data.dtype == torch.float32
    if not (is_fp32_weight and take_optimizer):
        return part
    known = (_MAIN + weight, f"{OPTIMIZER}state.param.{weight}", weight)
    return part._replace(name=next((name for name in known if name in names), part.name))


def _updates(folder: Path, metadata: Metadata) -> int:
    if UPDATES not in metadata.state_dict_metadata:
        return older_updates(folder)
    count = torch.zeros(1, dtype=torch.int64)
    read_parts(single_parts("", {UPDATES: count}), folder, metadata)
    return int(count)


def _random_state(
    folder: Path, metadata: Metadata, state: ParallelState
) -> dict[str, torch.Tensor]:
    prefix = f"{RANDOM_STATE}{state.rank}."
    stored = metadata.state_dict_metadata.items()
    sizes = {
        name.removeprefix(prefix): each.size for name, each in stored if name.startswith(prefix)
    }
    if not sizes:
        return older_random_state(folder, metadata, state.rank, state.world_size)
    states = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
    read_parts(single_parts(prefix, states), folder, metadata)
    return states
