"""From settings to what the cost model and the executor work with (L1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_kvshare.config.model import ModelConfig, SharingConfig
from megatron_kvshare.config.rules_model import sharing_map
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import (
    DEFAULT_RECIPE,
    RECIPES,
    Recipe,
    Solver,
    Start,
    Tolerance,
    name_of,
    solver_plan,
)

_USUAL_STRIDE = {Solver.JACOBI: 1, Solver.STRIDED: 4}


def recipe(sharing: SharingConfig, usual: Recipe = RECIPES[DEFAULT_RECIPE]) -> Recipe:
    """How cyclic groups are computed; flags of parts change ``usual`` where none says what they
    change. Raises :class:`MapError`."""
    named = _named(sharing) or usual
    solver = Solver(sharing.kv_solver or named.solver)
    stride = named.stride if solver is named.solver else _USUAL_STRIDE[solver]
    forward, backward = sharing.kv_forward_sweeps, sharing.kv_backward_sweeps
    return Recipe(
        solver=solver,
        stride=stride if sharing.kv_stride is None else sharing.kv_stride,
        forward_sweeps=named.forward_sweeps if forward is None else forward,
        backward_sweeps=named.backward_sweeps if backward is None else backward,
        start=Start(sharing.kv_start or named.start),
        project_at_use=sharing.kv_project_at_use or named.project_at_use,
    )


def _named(sharing: SharingConfig) -> Recipe | None:
    """By ``--kv-recipe``, or the published passes for who writes them as the method's users do:
    ``--kv-forward-sweeps 7 --kv-backward-sweeps 2``, or ``--kv-solver jacobi``."""
    if sharing.kv_recipe is not None:
        return RECIPES[sharing.kv_recipe]
    sweeps = (sharing.kv_forward_sweeps, sharing.kv_backward_sweeps)
    published = sharing.kv_solver == "jacobi" or any(number is not None for number in sweeps)
    return RECIPES["paper"] if published else None


def takes_usual_recipe(sharing: SharingConfig) -> bool:
    """Whether the settings leave open which recipe it is whose parts they may change."""
    return _named(sharing) is None


def with_recipe(sharing: SharingConfig, recipe: Recipe) -> SharingConfig:
    """The settings that say all of ``recipe``, whatever is usual."""
    parts: dict[str, Any] = {"kv_recipe": name_of(recipe)}
    if parts["kv_recipe"] is None:
        parts = {f"kv_{name}": value for name, value in recipe.as_dict().items()}
        parts["kv_recipe"] = "paper"
    return replace(sharing, **parts)


def execution_plan(model: ModelConfig, sharing: SharingConfig) -> ExecutionPlan:
    """The sweeps of training that the settings ask for. Raises :class:`MapError`."""
    tolerance = _tolerance(sharing) if sharing.kv_tolerance_in_training else None
    return solver_plan(sharing_map(model, sharing), recipe(sharing), tolerance)


def evaluation_plan(model: ModelConfig, sharing: SharingConfig) -> ExecutionPlan:
    """The sweeps of an evaluation: those of training, or as many as ``--kv-tolerance`` needs."""
    return solver_plan(sharing_map(model, sharing), recipe(sharing), _tolerance(sharing))


def _tolerance(sharing: SharingConfig) -> Tolerance | None:
    if sharing.kv_tolerance is None:
        return None
    return Tolerance(
        residual=sharing.kv_tolerance, least=sharing.kv_min_sweeps, most=sharing.kv_max_sweeps
    )
