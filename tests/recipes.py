"""Recipes in a line, for the suites."""

from __future__ import annotations

from megatron_kvshare.sharing.solver import Recipe, Solver, Start


def strided(stride: int, forward: int, backward: int, start: str = "zero", p: bool = False):
    return Recipe(
        solver=Solver.STRIDED,
        stride=stride,
        forward_sweeps=forward,
        backward_sweeps=backward,
        start=Start(start),
        project_at_use=p,
    )


def jacobi(forward: int, backward: int, start: str = "zero", p: bool = False) -> Recipe:
    return Recipe(
        forward_sweeps=forward, backward_sweeps=backward, start=Start(start), project_at_use=p
    )
