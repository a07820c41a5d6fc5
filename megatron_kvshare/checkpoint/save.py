"""Saving a checkpoint (L4): written aside, renamed when complete, announced in the tracker last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.integrity import mark_files
from megatron_kvshare.checkpoint.manifest import Manifest
from megatron_kvshare.checkpoint.random_state import random_state
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api import dist_checkpoint
from megatron_kvshare.megatron_api.optimizer import MegatronOptimizer
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.parameters import parameter_pieces

RANDOM_STATE = "random_state"


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
        CheckpointError: it could not be written; an earlier checkpoint is still intact.
    """
    step = manifest.progress.step
    target = folders.iteration_folder(root, step)
    aside = Path(_on_first_rank(state, target, lambda: str(folders.begin(target))))
    weights = sharded_weights(models, state)
    generators = random_state(state.platform.device)
    content: dict[str, Any] = {
        "model": weights,
        RANDOM_STATE: dist_checkpoint.per_rank_object(RANDOM_STATE, generators, state),
    }
    if optimizer is not None:
        content["optimizer"] = dist_checkpoint.sharded_optimizer(optimizer, weights, loading=False)
    try:
        dist_checkpoint.save(content, aside)
    except Exception as error:
        raise _cannot_write(target, error) from error
    try:
        marked = replace(manifest, files=mark_files(aside, state))
    except OSError as error:
        raise _cannot_write(target, error) from error
    _on_first_rank(state, target, lambda: _complete(marked, aside, target))
    return target


def sharded_weights(models: Sequence[KVShareGPT], state: ParallelState) -> dict[str, Any]:
    """What :mod:`dist_checkpoint` saves and loads, by stage; the names inside know no stages."""
    return {
        f"stage {model.stage.number}": dist_checkpoint.sharded_model(
            model, parameter_pieces(model), state, model.copies
        )
        for model in models
    }


def _complete(manifest: Manifest, aside: Path, target: Path) -> None:
    manifest.write(aside)
    folders.flush(aside)
    folders.publish(aside, target, manifest.progress.step)


def _on_first_rank(state: ParallelState, target: Path, action: Callable[[], Any]) -> Any:
    """Run ``action`` on rank 0 and return its result, or raise its failure, on every rank."""
    outcome: list[Any] = [None, None]
    if state.is_first:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise _cannot_write(target, outcome[1])
    return outcome[0]


def _cannot_write(target: Path, reason: object) -> CheckpointError:
    fix = "free space or permissions there, or choose another --save folder"
    return CheckpointError(Fault("--save", str(target), f"it cannot be written: {reason}", fix))
