"""A run that names no recipe goes on with that of its checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_kvshare.checkpoint.folder import candidates, iteration_folder
from megatron_kvshare.checkpoint.manifest import read_manifest
from megatron_kvshare.config import CheckpointConfig, PretrainConfig
from megatron_kvshare.config.derive import (
    checkpoint_settings,
    recipe,
    sharing_map,
    takes_usual_recipe,
    with_recipe,
)
from megatron_kvshare.errors import CheckpointError, MapError
from megatron_kvshare.sharing.solver import Recipe, recipe_name


def with_recipe_of_checkpoint(config: PretrainConfig, say: Callable[[str], None]) -> PretrainConfig:
    """``config`` with the recipe of the checkpoint that the run would load, where the map is cyclic
    and no flag names a recipe; flags of parts change it as they change the default.

    ``say`` is told. Where no recipe can be read the configuration stays as it is: what is wrong
    with map, parts or checkpoint is reported by those who use them.
    """
    sharing = config.sharing
    try:
        if not takes_usual_recipe(sharing) or not sharing_map(config.model, sharing).is_cyclic:
            return config
        stored = _stored_recipe(checkpoint_settings(config))
        if stored is None:
            return config
        changed = recipe(sharing, usual=stored)
    except MapError:
        return config
    change = "" if changed == stored else f", changed to {recipe_name(changed)}"
    source = f"going on with the checkpoint's, {recipe_name(stored)}"
    say(f"--kv-recipe is not given: {source}{change}")
    return replace(config, sharing=with_recipe(sharing, changed))


def _stored_recipe(settings: CheckpointConfig) -> Recipe | None:
    """Of the newest checkpoint that can be read, None where there is none or its map is acyclic."""
    for folder in _loadable(settings):
        try:
            stored = read_manifest(folder).identity["kv_recipe"]
        except CheckpointError:
            continue  # damaged: an older one will be loaded
        return None if stored is None else Recipe.from_dict(stored)
    return None


def _loadable(settings: CheckpointConfig) -> list[Path]:
    """The checkpoints of ``--save`` for ``--resume auto``, of ``--load`` while there are none."""
    roots = [
        (settings.save if settings.resume == "auto" else None, None),
        (settings.load, settings.ckpt_step),
    ]
    for root, step in ((Path(root), step) for root, step in roots if root is not None):
        folders = [iteration_folder(root, number) for number in candidates(root, step).iterations]
        if folders:
            return folders
    return []
