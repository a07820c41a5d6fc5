"""Random valid sharing maps for property tests, and the maps every suite goes through."""

from __future__ import annotations

from hypothesis import strategies as st

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.solver import Recipe, Solver, Start, Tolerance

NINE = tuple(
    f"{partition}-{position}"
    for partition in ("pizza", "sandwich", "lasagna")
    for position in ("bottom", "middle", "top")
)


@st.composite
def sharing_maps(draw: st.DrawFn, max_layers: int = 14, min_layers: int = 1) -> SharingMap:
    """Any valid map: some layers produce, every other one reads any of them."""
    layers = range(draw(st.integers(min_layers, max_layers)))
    producers = draw(st.sets(st.sampled_from(layers), min_size=1))
    pick = st.sampled_from(sorted(producers))
    sources = tuple(layer if layer in producers else draw(pick) for layer in layers)
    windowed = tuple(draw(st.booleans()) for _ in layers)
    return SharingMap(sources, windowed)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any valid recipe with few sweeps."""
    stride = draw(st.integers(1, 5))
    start, forward = draw(st.sampled_from(Start)), draw(st.integers(0, 3))
    return Recipe(
        solver=Solver.JACOBI if stride == 1 else Solver.STRIDED,
        stride=stride,
        forward_sweeps=forward,
        backward_sweeps=draw(st.integers(1, 3)),
        start=start,
        project_at_use=draw(st.booleans()) and (forward > 0 or start is Start.SELF),
    )


@st.composite
def tolerances(draw: st.DrawFn) -> Tolerance:
    most = draw(st.integers(1, 4))
    return Tolerance(residual=0.01, least=draw(st.integers(0, most)), most=most)
