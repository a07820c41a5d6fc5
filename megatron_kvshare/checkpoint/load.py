"""Loading a checkpoint (L4): found, compared with the run, read on any tensor-parallel layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.integrity import problems_of_all
from megatron_kvshare.checkpoint.manifest import (
    Manifest,
    NewerFormat,
    Progress,
    check_identity,
    read_manifest,
)
from megatron_kvshare.checkpoint.random_state import set_random_state
from megatron_kvshare.checkpoint.save import RANDOM_STATE, sharded_weights
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api import dist_checkpoint
from megatron_kvshare.megatron_api.optimizer import MegatronOptimizer, reload_parameters
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT


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


def chosen(settings: CheckpointConfig, state: ParallelState) -> CheckpointConfig:
    """The settings with ``--resume auto`` carried out; all ranks call this.

    Raises:
        CheckpointError: the run would write over checkpoints of another one.
    """
    if settings.save is None:
        return settings
    root = Path(settings.save)
    found: list[Any] = [bool(folders.candidates(root).iterations) if state.is_first else None]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        return settings
    if settings.resume == "auto":
        whole = {"finetune": False, "no_load_optim": False, "no_load_rng": False}
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
    found: list[Any] = [folders.candidates(root) if state.is_first else None]
    dist.broadcast_object_list(found, src=0)
    iterations, complaint = found[0]
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
    return Newest(None)


def find_checkpoint(
    settings: CheckpointConfig,
    identity: dict[str, Any],
    optimizer_format: str,
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
    if take_optimizer:
        _check_optimizer(folder, manifest.optimizer_format, optimizer_format)
    ranks = manifest.tensor_parallel * manifest.pipeline_parallel * manifest.data_parallel
    same_world = ranks == world_size
    return Found(
        folder,
        manifest,
        take_optimizer,
        take_random_state=same_world and not (settings.no_load_rng or settings.finetune),
        progress=Progress() if settings.finetune else manifest.progress,
        stays=folder if settings.load == settings.save and not settings.finetune else None,
    )


def _check_optimizer(folder: Path, stored: str | None, wanted: str) -> None:
    if stored == wanted:
        return
    rule = "it was saved without optimizer state"
    fix = "add --no-load-optim to continue without it, or --finetune to start from step 0"
    if stored is not None:
        rule = f"its optimizer state is {stored}, this run's is {wanted}"
        fix = "set --use-distributed-optimizer and --bf16 as in the run that saved it, or " + fix
    raise CheckpointError(Fault("--load", str(folder), rule, fix))


def load_checkpoint(
    found: Found, models: Sequence[KVShareGPT], optimizer: MegatronOptimizer, state: ParallelState
) -> None:
    """Fill ``models``, this rank's pipeline stages, and ``optimizer``; all ranks call this.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    weights = sharded_weights(models, state)
    wanted: dict[str, Any] = {"model": weights}
    if found.take_optimizer:
        wanted["optimizer"] = dist_checkpoint.sharded_optimizer(optimizer, weights, loading=True)
    if found.take_random_state:
        wanted[RANDOM_STATE] = dist_checkpoint.per_rank_object(RANDOM_STATE, None, state)
    try:
        values = dist_checkpoint.load(wanted, found.folder)
    except Exception as error:
        rule = f"it cannot be read: {error}"
        fix = f"write the number of another iter_* folder into {folders.TRACKER}"
        raise CheckpointError(Fault("--load", str(found.folder), rule, fix)) from error
    for model, stage in zip(models, weights, strict=True):
        dist_checkpoint.load_model(model, values["model"][stage])
    if found.take_optimizer:
        dist_checkpoint.load_optimizer(optimizer, values["optimizer"])
    else:
        reload_parameters(optimizer)
    if found.take_random_state:
        set_random_state(values[RANDOM_STATE], state.platform.device)
