"""Rules of the recipe: how cyclic maps are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from megatron_kvshare.config.derive import recipe, sharing_map
from megatron_kvshare.config.fields.model import ParallelConfig, SharingConfig
from megatron_kvshare.config.flags.rule import multiples, rule
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.config.rules.model import HasSharing
from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing.map import SharingMap

_RECIPE = (
    "kv_recipe kv_solver kv_stride kv_forward_sweeps kv_backward_sweeps kv_start kv_project_at_use"
)
_MAP = "num_layers kv_pattern kv_layers kv_map"


class HasRecipe(HasSharing, Protocol):
    """A configuration with a model, a sharing map and its parallel layout."""

    @property
    def parallel(self) -> ParallelConfig: ...


@rule(_RECIPE)
def recipe_is_possible(config: HasSharing) -> Iterator[Fault]:
    """The parts of the recipe fit together."""
    try:
        recipe(config.sharing)
    except MapError as error:
        yield from error.faults


@rule("kv_tolerance kv_min_sweeps kv_max_sweeps kv_tolerance_in_training")
def tolerance_fits(config: HasSharing) -> Iterator[Fault]:
    """The floor is below the cap, and training by tolerance has one."""
    sharing = config.sharing
    if sharing.kv_min_sweeps > sharing.kv_max_sweeps:
        yield Fault(
            "--kv-min-sweeps",
            sharing.kv_min_sweeps,
            f"it must be at most --kv-max-sweeps {sharing.kv_max_sweeps}",
            f"use --kv-min-sweeps {sharing.kv_max_sweeps} or less",
        )
    if sharing.kv_tolerance_in_training and sharing.kv_tolerance is None:
        rule_text = "it needs --kv-tolerance"
        yield Fault("--kv-tolerance-in-training", True, rule_text, "add --kv-tolerance 0.01")


@rule(f"{_RECIPE} {_MAP} seq_length sequence_parallel tensor_model_parallel_size")
def subsets_fit_sequence_parallel(config: HasRecipe) -> Iterator[Fault]:
    """Every tensor-parallel rank holds the same part of every token subset."""
    parallel, length = config.parallel, config.model.seq_length
    if not parallel.sequence_parallel or parallel.tensor_model_parallel_size == 1:
        return
    try:
        stride = recipe(config.sharing).stride
        cyclic = sharing_map(config.model, config.sharing).is_cyclic
    except MapError:
        return  # other rules tell
    step = stride * parallel.tensor_model_parallel_size
    if cyclic and stride > 1 and length % step:
        yield Fault(
            "--seq-length",
            length,
            f"with --sequence-parallel it must be divisible by --kv-stride {stride} x"
            f" --tensor-model-parallel-size {parallel.tensor_model_parallel_size} = {step}",
            f"use --seq-length {multiples(length, step)}",
        )


def recipe_warnings(sharing: SharingConfig, map: SharingMap) -> list[str]:
    """Recipe flags that do nothing."""
    if map.is_cyclic:
        return []
    names = [*_RECIPE.split(), "kv_tolerance"]
    given = [
        flag_of(name)
        for name in names
        if getattr(sharing, name) is not None and getattr(sharing, name) is not False
    ]
    if not given:
        return []
    return [f"{' and '.join(given)}: no effect, no layer of this map reads a higher one"]


SOLVER_RULES = (recipe_is_possible, tolerance_fits)
"""Of every command that has a map; the layout's rule is :func:`subsets_fit_sequence_parallel`."""
