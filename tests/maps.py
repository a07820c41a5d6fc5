"""Sharing maps the suites run: every named one at several sizes, the presets, and random ones."""

from __future__ import annotations

import random

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map

NINE = tuple(
    f"{partition}-{position}"
    for partition in ("pizza", "sandwich", "lasagna")
    for position in ("bottom", "middle", "top")
)
BETWEEN = tuple(
    f"{partition}-middle-{quarter}"
    for partition in ("pizza", "sandwich", "lasagna")
    for quarter in ("1/4", "3/4")
)
LASAGNA0 = ("lasagna0-top", "lasagna0-middle")
KV_LAYERS = {4: (1, 2, 3), 8: (2, 3, 5), 12: (3, 6)}
"""Numbers of KV layers tried with the partition-position maps, by number of layers."""
SMALL_MIXATTENTION = "0_1s_1s_3s_0_5s_5s_7s"


def named_maps(num_layers: int) -> dict[str, SharingMap]:
    """Every named map for a model of 4, 8 or 12 layers, by a readable name."""
    maps = {}
    for pattern in (*NINE, *BETWEEN, *LASAGNA0):
        for kv_layers in KV_LAYERS[num_layers]:
            if pattern not in LASAGNA0 or kv_layers > 1:
                maps[f"{pattern}.l{kv_layers}"] = build_map(num_layers, pattern, kv_layers)
    for preset in ("standard", "cla:2", "cla:3", "mlkv:2", "mlkv:4", "lckv:0", "lckv:2", "yoco"):
        maps[preset] = build_map(num_layers, preset)
    if num_layers > 4:
        maps["gemma"] = build_map(num_layers, "gemma:2" if num_layers == 8 else "gemma:6")
    if num_layers == 8:
        maps["mixattention"] = build_map(8, kv_map=SMALL_MIXATTENTION)
    return maps


def random_map(seed: int, num_layers: int) -> SharingMap:
    """A map with random producers, targets and windows; most have groups with several targets."""
    draw = random.Random(seed)
    producers = draw.sample(range(num_layers), draw.randint(1, num_layers // 2 + 1))
    sources = [i if i in producers else draw.choice(producers) for i in range(num_layers)]
    windowed = [draw.random() < 0.25 for _ in range(num_layers)]
    return SharingMap(tuple(sources), tuple(windowed))


def random_maps(num_layers: int, count: int) -> dict[str, SharingMap]:
    return {f"random.{seed}": random_map(seed, num_layers) for seed in range(count)}
