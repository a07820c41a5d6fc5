"""How a cyclic group is solved: recipes, and the sweep plans they make (no torch).

The KV that upward layers read depends on those layers themselves: a fixed point. A recipe says how
it is approached. ``jacobi`` (arXiv 2410.14442, section 3.3) lets every token read the KV of the
sweep before; ``strided`` (Gauss-Seidel) visits the tokens in ``stride`` interleaved subsets, and a
subset reads what the earlier ones have just refreshed. All recipes have the same fixed point:
after ``n`` sweeps the first ``n * stride`` tokens are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import (
    Carry,
    ExecutionPlan,
    LayerStep,
    Segment,
    StepMode,
    Sweep,
    Visit,
)

_OLD_PARTS = {"forward_passes": "forward_sweeps", "backward_passes": "backward_sweeps"}
_EXACT_STRIDE = 8
EXACT_RESIDUAL_FP32, EXACT_RESIDUAL_BF16 = 1e-6, 4e-3
"""KV that move by less have converged: about the rounding of one sweep."""


class Solver(StrEnum):
    """The order in which a sweep visits tokens."""

    JACOBI = "jacobi"
    STRIDED = "strided"


class Start(StrEnum):
    """What the first sweep reads of tokens it has not visited yet."""

    ZERO = "zero"  # nothing (published)
    INPUT = "input"  # the target's W_K, W_V applied to the group's input
    SELF = "self"  # of one parallel sweep, in which upward layers read W_K, W_V of their own input


def sweep_faults(forward_sweeps: int, backward_sweeps: int) -> list[Fault]:
    """What is wrong with the numbers of sweeps (empty when they are fine)."""
    faults = []
    if forward_sweeps < 0:
        rule = "the number of sweeps without gradient cannot be negative"
        fix = "use 0 or more (the published value is 7)"
        faults.append(Fault("--kv-forward-sweeps", forward_sweeps, rule, fix))
    if backward_sweeps < 1:
        rule = "at least one sweep must carry gradient, or nothing in the group is trained"
        fix = "use 1 or more (the published value is 2)"
        faults.append(Fault("--kv-backward-sweeps", backward_sweeps, rule, fix))
    return faults


def _stride_faults(solver: Solver, stride: int) -> list[Fault]:
    if solver is Solver.STRIDED and stride < 2:
        rule = "the strided solver needs at least two token subsets"
        return [Fault("--kv-stride", stride, rule, "use --kv-stride 4, or --kv-solver jacobi")]
    if solver is Solver.JACOBI and stride != 1:
        rule = "the jacobi solver visits all tokens at once"
        return [Fault("--kv-stride", stride, rule, "add --kv-solver strided, or drop --kv-stride")]
    return []


def _projection_faults(recipe: Recipe) -> list[Fault]:
    if not recipe.project_at_use or recipe.forward_sweeps > 0 or recipe.start is Start.SELF:
        return []
    rule = "it concerns what leaves the sweeps without gradient, and there are none"
    fix = "use --kv-forward-sweeps 1 or --kv-start self, or drop --kv-project-at-use"
    return [Fault("--kv-project-at-use", True, rule, fix)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to compute every cyclic group of a map.

    ``forward_sweeps`` sweeps without gradient, then ``backward_sweeps`` with. ``project_at_use``:
    what leaves the sweeps without gradient is the input of the producers, not their KV, and the
    first sweep with gradient applies ``W_K``, ``W_V`` to it, so that these are trained through
    every reader. Raises :class:`MapError`, with all faults at once, for a recipe that cannot be.
    """

    solver: Solver = Solver.JACOBI
    stride: int = 1
    forward_sweeps: int = 7
    backward_sweeps: int = 2
    start: Start = Start.ZERO
    project_at_use: bool = False

    def __post_init__(self) -> None:
        faults = [
            *sweep_faults(self.forward_sweeps, self.backward_sweeps),
            *_stride_faults(self.solver, self.stride),
            *_projection_faults(self),
        ]
        if faults:
            raise MapError(faults)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`as_dict`, whose keys had other names before."""
        current = {_OLD_PARTS.get(name, name): value for name, value in values.items()}
        enums = {"solver": Solver(values["solver"]), "start": Start(values["start"])}
        return cls(**{**current, **enums})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints and exports store them."""
        values = asdict(self)
        return {**values, "solver": str(self.solver), "start": str(self.start)}

    def for_length(self, length: int) -> Recipe:
        """The same recipe for a text of ``length`` tokens: subsets that have none are left out."""
        if self.stride <= length:
            return self
        solver = Solver.JACOBI if length == 1 else self.solver
        return replace(self, solver=solver, stride=length)

    def __str__(self) -> str:
        """``strided(4; 1, 1)p``, ``jacobi(7, 2)``, ``strided(4; 0, 1) from input``."""
        stride = f"{self.stride}; " if self.solver is Solver.STRIDED else ""
        sweeps = f"{self.forward_sweeps}, {self.backward_sweeps}"
        start = "" if self.start is Start.ZERO else f" from {self.start}"
        return f"{self.solver}({stride}{sweeps}){'p' * self.project_at_use}{start}"


OLD_NAMES = {"cheapest": "one-sweep", "fast": "two-sweep"}
"""What recipes were called before, and are called now."""


def current_name(name: str) -> str:
    """The name of a recipe today, of one that may be an earlier one."""
    return OLD_NAMES.get(name, name)


class _Recipes(dict[str, Recipe]):
    """Recipes by name; the earlier names find them too, but are not listed."""

    def __missing__(self, name: str) -> Recipe:
        return self[OLD_NAMES[name]]


RECIPES: Mapping[str, Recipe] = _Recipes(
    {
        "one-sweep": Recipe(
            solver=Solver.STRIDED, stride=4, forward_sweeps=0, backward_sweeps=1, start=Start.INPUT
        ),
        "two-sweep": Recipe(
            solver=Solver.STRIDED,
            stride=4,
            forward_sweeps=1,
            backward_sweeps=1,
            project_at_use=True,
        ),
        "paper": Recipe(),
    }
)
"""Recipes with a name, the cheapest first."""
DEFAULT_RECIPE = "two-sweep"
"""Provisionally, for its safety on top maps: with groups of 20 layers ``one-sweep`` was unsteady,
at 1.1B worse than no sharing; these are few seeds and short runs (docs/solvers.md)."""


def name_of(recipe: Recipe) -> str | None:
    """What ``recipe`` is called; None without a name."""
    return next((name for name, known in RECIPES.items() if known == recipe), None)


def with_more_sweeps(recipe: Recipe) -> str:
    """The named recipes to try where ``recipe`` is too far from its fixed point, as a flag; empty
    for ``paper``."""
    names = list(RECIPES)  # the cheapest first; without a name it may be as cheap as that
    current = name_of(recipe) or names[0]
    better = names[names.index(current) + 1 :]
    return f"--kv-recipe {' or '.join(better)}" if better else ""


def recipe_name(recipe: Recipe) -> str:
    """``two-sweep: strided(4; 1, 1)p``; without a name the notation alone."""
    name = name_of(recipe)
    return f"{name}: {recipe}" if name else str(recipe)


CONVERGED_PREFILL = Recipe(solver=Solver.STRIDED, stride=8, forward_sweeps=1, backward_sweeps=1)
"""For a prompt, before decoding, which is exact. Two sweeps over eight subsets: of the plans that
``benchmarks/solvers.py`` measures, the fastest whose loss is less than 0.001 from exact for every
model (docs/solvers.md)."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Sweeps without gradient go on until the KV residual is at most ``residual``.

    At least ``least`` of them run, at most ``most``. The residual of a sweep is
    ``||KV_n - KV_{n-1}|| / ||KV_n||`` over the targets of the group, on all ranks together.
    """

    residual: float
    least: int
    most: int


def solver_plan(
    map: SharingMap, recipe: Recipe, tolerance: Tolerance | None = None, skip: bool = True
) -> ExecutionPlan:
    """The sweeps of ``recipe`` for every cyclic group; layers outside groups run once.

    With a ``tolerance`` the number of sweeps without gradient is found while running, between its
    limits, and ``forward_sweeps`` does not matter. ``skip`` leaves out what a sweep does not need,
    without changing any result: attention of upward layers that have nothing to read, and all but
    the KV of the group's top layer in every sweep but the last.
    """
    segments: list[Segment] = []
    start = 0
    for first, last in map.cyclic_groups:
        if start < first:
            segments.append(_single_sweep(start, first - 1))
        segments.append(_Group(map, first, last, recipe, skip).segment(tolerance))
        start = last + 1
    if start < map.num_layers:
        segments.append(_single_sweep(start, map.num_layers - 1))
    return ExecutionPlan(map, tuple(segments))


def exact_plan(
    map: SharingMap, length: int, residual: float, sequence_ranks: int = 1
) -> ExecutionPlan:
    """Sweeps until nothing moves by more than ``residual``: what token by token gives.

    At most ``length / stride`` sweeps, after which every token is exact however slowly they
    converge. ``sequence_ranks``: parts of the sequence that each hold whole subsets.
    """
    stride = _EXACT_STRIDE
    if sequence_ranks > 1:
        stride = math.gcd(stride, length // sequence_ranks)
    solver = Solver.STRIDED if stride > 1 else Solver.JACOBI
    recipe = Recipe(solver=solver, stride=stride, forward_sweeps=1, backward_sweeps=1)
    recipe = recipe.for_length(length)
    most = max(1, -(-length // recipe.stride) - 1)
    return solver_plan(map, recipe, Tolerance(residual=residual, least=1, most=most))


def jacobi_plan(
    map: SharingMap, forward_sweeps: int = 7, backward_sweeps: int = 2, skip: bool = True
) -> ExecutionPlan:
    """The published iteration. Raises :class:`MapError` for an impossible number of sweeps."""
    recipe = Recipe(forward_sweeps=forward_sweeps, backward_sweeps=backward_sweeps)
    return solver_plan(map, recipe, skip=skip)


def _single_sweep(first: int, last: int) -> Segment:
    steps = tuple(LayerStep(layer) for layer in range(first, last + 1))
    return Segment(first, last, (Sweep((Visit(steps),), gradient=True, last=True),))


@dataclass(frozen=True)
class _Group:
    """Builds the sweeps of layers ``first..last``."""

    map: SharingMap
    first: int
    last: int
    recipe: Recipe
    skip: bool

    def segment(self, tolerance: Tolerance | None) -> Segment:
        recipe = self.recipe
        without_gradient = recipe.forward_sweeps if tolerance is None else tolerance.most
        count = without_gradient + recipe.backward_sweeps
        sweeps = [self._sweep(number, without_gradient, count) for number in range(count)]
        if tolerance is not None:
            for number in range(tolerance.least, without_gradient):
                sweeps[number] = replace(sweeps[number], skip_below=tolerance.residual)
        if recipe.start is Start.SELF:
            sweeps.insert(0, self._start_sweep())
        if recipe.project_at_use:
            sweeps = _projecting(sweeps)
        return Segment(self.first, self.last, tuple(sweeps), self._targets)

    @property
    def _layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def _targets(self) -> tuple[int, ...]:
        targets = {self.map.sources[layer] for layer in self._layers if self.map.is_upward(layer)}
        return tuple(sorted(targets))

    def _carried(self, stride: int) -> tuple[int, ...]:
        """With all tokens at once only upward layers read what the sweep has yet to make."""
        if stride == 1:
            return self._targets
        read = {self.map.sources[layer] for layer in self._layers if layer != self.last}
        return tuple(sorted(read & set(self._layers)))

    def _sweep(self, number: int, without_gradient: int, count: int) -> Sweep:
        stride, last = self.recipe.stride, number == count - 1
        carry = self._first_carry() if number == 0 else Carry.KV
        visits = tuple(
            Visit(tuple(self._step(layer, offset, carry, last) for layer in self._layers), offset)
            for offset in range(stride)
        )
        top = LayerStep(self.last, StepMode.KV_GIVEN)
        return Sweep(
            visits,
            gradient=number >= without_gradient,
            last=last,
            carry=carry,
            carried=self._carried(stride),
            finish=(top,) if last and stride > 1 else (),
        )

    def _step(self, layer: int, offset: int, carry: Carry, last: bool) -> LayerStep:
        """In strided sweeps the top layer waits for the KV of all tokens, see ``Sweep.finish``."""
        if layer == self.last and (self.recipe.stride > 1 or (self.skip and not last)):
            return LayerStep(layer, StepMode.KV_ONLY)
        blind = carry is Carry.NOTHING and offset == 0 and self.map.is_upward(layer)
        if blind and (self.skip or self.recipe.stride > 1):
            return LayerStep(layer, StepMode.NO_ATTENTION)
        return LayerStep(layer)

    def _first_carry(self) -> Carry:
        carries = {
            Start.ZERO: Carry.NOTHING,
            Start.INPUT: Carry.GROUP_INPUT,
            Start.SELF: Carry.KV,
        }
        return carries[self.recipe.start]

    def _start_sweep(self) -> Sweep:
        """All tokens at once; what an upward layer would read is guessed from its own input."""

        def mode(layer: int) -> StepMode:
            if layer == self.last:
                return StepMode.KV_ONLY
            return StepMode.OWN_INPUT if self.map.is_upward(layer) else StepMode.FULL

        steps = tuple(LayerStep(layer, mode(layer)) for layer in self._layers)
        return Sweep((Visit(steps),), gradient=False, last=False, carried=self._targets)


def _projecting(sweeps: list[Sweep]) -> list[Sweep]:
    """Between the last sweep without gradient and the first one with it, carry producers' inputs.

    Where sweeps may be left out any of them can be that last one.
    """
    first_gradient = next(number for number, sweep in enumerate(sweeps) if sweep.gradient)
    for number in range(first_gradient):
        later = sweeps[number + 1 : first_gradient]
        may_be_last = all(sweep.skip_below is not None for sweep in later)
        sweeps[number] = replace(sweeps[number], keep_inputs=may_be_last)
    sweeps[first_gradient] = replace(sweeps[first_gradient], carry=Carry.PROJECTED)
    return sweeps
