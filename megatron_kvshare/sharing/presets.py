"""Maps published under a name of their own, such as CLA, LCKV and YOCO (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.partitions import partition_map

MIXATTENTION = "0_1s_1s_3s_3s_3s_0_7s_7s_9s_9s_9s_12_13s_13s_15s_15s_15s_12_19s_19s_19s"
_GEMMA_FULL_EVERY = 5


def _standard(num_layers: int, _: int) -> SharingMap:
    return SharingMap(tuple(range(num_layers)), (False,) * num_layers)


def _cla(num_layers: int, size: int) -> SharingMap:
    """Groups of ``size`` counted from layer 0; what is left forms a smaller last group."""
    sources = tuple(layer - layer % size for layer in range(num_layers))
    return SharingMap(sources, (False,) * num_layers)


def _lckv(num_layers: int, warmup_layers: int) -> SharingMap:
    return partition_map("sandwich-top", num_layers, warmup_layers + 1)


def _yoco(num_layers: int, _: int) -> SharingMap:
    half = num_layers // 2
    sources = tuple(min(layer, half) for layer in range(num_layers))
    return SharingMap(sources, tuple(layer < half for layer in range(num_layers)))


def _gemma(num_layers: int, shared: int) -> SharingMap:
    windowed = tuple((layer + 1) % _GEMMA_FULL_EVERY > 0 for layer in range(num_layers))
    own = num_layers - shared
    sources = list(range(own))
    for layer in range(own, num_layers):
        alike = [source for source in range(own) if windowed[source] == windowed[layer]]
        if not alike:
            kind = "sliding-window" if windowed[layer] else "full-attention"
            rule = f"layer {layer} is a {kind} layer, and none of the first {own} layers is one"
            fix = "share fewer layers: every shared layer needs an own layer of its kind below it"
            raise MapError(Fault("--kv-pattern", f"gemma:{shared}", rule, fix))
        sources.append(alike[-1])
    return SharingMap(tuple(sources), windowed)


def _mixattention(num_layers: int, _: int) -> SharingMap:
    published = SharingMap.parse(MIXATTENTION)
    if num_layers != published.num_layers:
        rule = f"mixattention is published for {published.num_layers} layers only"
        fix = (
            f"use --num-layers {published.num_layers}, or write the map you want with --kv-map, "
            "for example 0_1s_1s_3s_0_5s_5s_7s for 8 layers"
        )
        raise MapError(Fault("--num-layers", num_layers, rule, fix))
    return published


@dataclass(frozen=True)
class Preset:
    """``build(num_layers, parameter)``; ``parameter`` is its name when one follows a colon."""

    build: Callable[[int, int], SharingMap]
    text: str
    parameter: str = ""
    example: int = 0
    bounds: Callable[[int], tuple[int, int]] = lambda num_layers: (0, num_layers)

    def written(self, name: str) -> str:
        """How a user writes it, for example ``cla:G``."""
        return f"{name}:{self.parameter}" if self.parameter else name


PRESETS = {
    "standard": Preset(_standard, "every layer owns its KV (no sharing)"),
    "cla": Preset(
        _cla,
        "groups of G consecutive layers read the lowest of them (CLA, 2405.12981)",
        "G",
        2,
        lambda layers: (1, layers),
    ),
    "mlkv": Preset(
        _cla,
        "as cla:G; fewer KV heads come from --num-query-groups (MLKV, 2406.09297)",
        "G",
        2,
        lambda layers: (1, layers),
    ),
    "lckv": Preset(
        _lckv,
        "sandwich-top with W warm-up layers, l = W + 1 (LCKV, 2405.10637)",
        "W",
        2,
        lambda layers: (0, layers - 1),
    ),
    "yoco": Preset(
        _yoco, "windowed lower half; the upper half reads its lowest layer (YOCO, 2405.05254)"
    ),
    "gemma": Preset(
        _gemma,
        "every fifth layer full, others windowed; the last N read the last own layer of their kind",
        "N",
        8,
        lambda layers: (0, layers - 1),
    ),
    "mixattention": Preset(_mixattention, "the published 22-layer map (MixAttention, 2409.15012)"),
}
