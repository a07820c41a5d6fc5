"""Random valid sharing maps for property tests, and the maps every suite goes through."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_kvshare.sharing.map import SharingMap

# A busy machine is no fault of the code, so time is not judged.
settings.register_profile(
    "kvshare", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvshare")

NINE = tuple(
    f"{partition}-{position}"
    for partition in ("pizza", "sandwich", "lasagna")
    for position in ("bottom", "middle", "top")
)


@st.composite
def sharing_maps(draw: st.DrawFn, max_layers: int = 14) -> SharingMap:
    """Any valid map: some layers produce, every other one reads any of them."""
    layers = range(draw(st.integers(1, max_layers)))
    producers = draw(st.sets(st.sampled_from(layers), min_size=1))
    pick = st.sampled_from(sorted(producers))
    sources = tuple(layer if layer in producers else draw(pick) for layer in layers)
    windowed = tuple(draw(st.booleans()) for _ in layers)
    return SharingMap(sources, windowed)
