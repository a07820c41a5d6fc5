"""What the exactness suite runs: every named map and random ones, each for 4, 8 and 12 layers."""

from __future__ import annotations

import pytest

from megatron_kvshare.sharing.map import SharingMap
from tests.maps import named_maps, random_maps

LAYERS = (4, 8, 12)
RANDOM = {4: 4, 8: 6, 12: 4}
"""How many random maps join the named ones, by number of layers."""


def all_maps(num_layers: int) -> dict[str, SharingMap]:
    return {**named_maps(num_layers), **random_maps(num_layers, RANDOM[num_layers])}


def each_map(*layers: int, cyclic: bool = False) -> pytest.MarkDecorator:
    """Parametrises `sharing` with all maps of these depths, or with those that iterate.

    A test's id reads like `L8-lasagna-top.l3`.
    """
    return pytest.mark.parametrize(
        "sharing",
        [
            pytest.param(sharing, id=f"L{num_layers}-{name}")
            for num_layers in layers or LAYERS
            for name, sharing in all_maps(num_layers).items()
            if sharing.is_cyclic or not cyclic
        ],
    )


def one_of_each_pattern() -> pytest.MarkDecorator:
    """Parametrises `sharing` with every named map once, for 8 layers, and random ones."""
    chosen: dict[str, SharingMap] = {}
    for name, sharing in all_maps(8).items():
        pattern = name.split(".l")[0]
        wanted = not name.endswith((".l2", ".l5"))
        if wanted:
            chosen[pattern] = sharing
    return pytest.mark.parametrize(
        "sharing", [pytest.param(sharing, id=name) for name, sharing in chosen.items()]
    )
