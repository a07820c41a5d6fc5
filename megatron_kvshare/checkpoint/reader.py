"""A checkpoint as one process sees it, of any layout and without starting its ranks: found,
described, its model built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.integrity import problems
from megatron_kvshare.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megatron_kvshare.checkpoint.pickles import damaged
from megatron_kvshare.checkpoint.tensors import (
    StoredWeights,
    TensorInfo,
    TensorSource,
    stored_tensors,
)
from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT, build_stages
from megatron_kvshare.model.parameters import fill
from megatron_kvshare.sharing.solver import solver_plan
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.stages.placement import Placement

_SHOWN = 8
"""Tensors that do not fit, named in one message; the others are counted."""


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint of any layout, opened without starting its ranks; ``doubts``: why it may not be
    the one that was meant."""

    folder: Path
    manifest: Manifest
    spec: ModelSpec
    weights: StoredWeights
    doubts: tuple[str, ...] = ()


def open_checkpoint(path: Path) -> StoredModel:
    """Open the newest checkpoint of a ``--save`` folder, or one of the folders in it.

    Raises:
        CheckpointError: there is none, it is damaged, or its tensors are not those of its model.
    """
    folder, doubt = path, None
    if not (path / MANIFEST).is_file():
        iteration = folders.latest_iteration(path) if path.is_dir() else None
        if iteration is None:
            rule = f"there is no checkpoint of megatron_kvshare in it (no {folders.TRACKER})"
            fix = "give the --save folder of a run, or one of its iter_* or global_step* folders"
            raise CheckpointError(Fault("--load", str(path), rule, fix))
        folder = folders.iteration_folder(path, iteration)
        doubt = folders.passed_over(path, iteration)
    manifest = read_manifest(folder)
    reasons = problems(folder, manifest.files)
    if reasons:
        raise damaged(folder, "; ".join(reasons[:3]))
    spec = ModelSpec.of_identity(manifest.identity, manifest.config)
    weights = StoredWeights(stored_tensors(folder, manifest))
    check_weights(folder, weights.tensors, spec.weight_shapes)
    # In the order of the model: files list tensors in the order in which ranks wrote them.
    weights.tensors = {name: weights.tensors[name] for name in spec.weight_shapes}
    return StoredModel(folder, manifest, spec, weights, (doubt,) if doubt else ())


def check_weights(
    folder: Path, found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise :class:`CheckpointError` with everything that is missing, too much or of another
    shape."""
    rules = {name: "it is missing" for name in wanted.keys() - found.keys()}
    rules |= {name: "the model has no such tensor" for name in found.keys() - wanted.keys()}
    rules |= {
        name: f"the model's has the shape {wanted[name]}"
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name]
    }
    if not rules:
        return
    fix = "complete the files, or give the configuration that belongs to them"
    faults = [
        Fault(f"{folder}: {name}", found[name].shape if name in found else None, rule, fix)
        for name, rule in sorted(rules.items())
    ]
    if len(faults) > _SHOWN:
        rest = f"{len(faults) - _SHOWN} more tensors do not fit"
        faults[_SHOWN:] = [Fault(str(folder), None, rest, fix)]
    raise CheckpointError(faults)


def native_model(spec: ModelSpec, source: TensorSource, state: ParallelState) -> KVShareGPT:
    """The native model in one process, with the weights of ``source``."""
    assert state.world_size == 1, "one process holds the whole model"
    return model_without_stages(spec, source, state)


def model_without_stages(spec: ModelSpec, source: TensorSource, state: ParallelState) -> KVShareGPT:
    """All layers, of each the part of this tensor-parallel rank, with the weights of ``source``."""
    plan, stages = solver_plan(spec.map, spec.recipe), Placement.whole(spec.map).stages
    layout = ParallelConfig(tensor_model_parallel_size=state.tp_size)
    (model,) = build_stages(spec, layout, plan, stages, state)
    fill(model, source.read)
    return model


def without_training(spec: ModelSpec, bf16: bool = False) -> ModelSpec:
    """The same model without what only training needs."""
    # Texts of any length: compiling for them would cost more than it gains.
    plain = {"recompute_granularity": None, "transformer_impl": "local", "compile": False}
    return replace(spec, model=replace(spec.model, bf16=bf16, **plain))


def whole_model(spec: ModelSpec, source: TensorSource, state: ParallelState) -> KVShareGPT:
    """The native model in one process in fp32, for scoring."""
    return native_model(without_training(spec), source, state).eval()
