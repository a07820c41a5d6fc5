"""Maps named partition-position, for example ``sandwich-top`` (no torch).

A partition cuts the layers into sharing groups, a position picks each group's target. The nine
named configurations are {pizza, sandwich, lasagna} x {bottom, middle, top} of arXiv 2410.14442,
section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing.map import SharingMap

Group = tuple[int, int]  # first and last layer, inclusive


def _pizza(num_layers: int, kv_layers: int) -> list[Group]:
    return [*_singles(0, kv_layers - 1), (kv_layers - 1, num_layers - 1)]


def _sandwich(num_layers: int, kv_layers: int) -> list[Group]:
    bottom = kv_layers // 2  # ceil((l - 1) / 2)
    top_start = num_layers - (kv_layers - 1) // 2
    return [*_singles(0, bottom), (bottom, top_start - 1), *_singles(top_start, num_layers)]


def _lasagna(num_layers: int, kv_layers: int) -> list[Group]:
    return _cut(0, num_layers, kv_layers)


def _lasagna0(num_layers: int, kv_layers: int) -> list[Group]:
    return [(0, 0), *_cut(1, num_layers, kv_layers - 1)]


def _singles(start: int, stop: int) -> list[Group]:
    return [(layer, layer) for layer in range(start, stop)]


def _cut(start: int, stop: int, parts: int) -> list[Group]:
    """Cut layers ``start..stop-1`` into consecutive parts; a remainder goes to the lowest ones."""
    groups = []
    for part in range(parts):
        size, remainder = divmod(stop - start, parts - part)
        end = start + size + (remainder > 0)
        groups.append((start, end - 1))
        start = end
    return groups


@dataclass(frozen=True)
class _Partition:
    cut: Callable[[int, int], list[Group]]  # (num_layers, kv_layers) -> groups, bottom to top
    text: str
    least_kv_layers: int = 1


_PARTITIONS = {
    "pizza": _Partition(_pizza, "the first l-1 layers own their KV, all others share one target"),
    "sandwich": _Partition(
        _sandwich, "the first and last (l-1)/2 layers own their KV, the middle shares one target"
    ),
    "lasagna": _Partition(_lasagna, "l consecutive groups, each with its own target"),
    "lasagna0": _Partition(
        _lasagna0, "layer 0 owns its KV, the others form l-1 consecutive groups", 2
    ),
}

_POSITIONS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "bottom": (lambda first, last: first, "the lowest layer of a group is its target"),
    "middle": (lambda first, last: (first + last) // 2, "the middle layer is the target"),
    "middle-1/4": (
        lambda first, last: first + (last - first) // 4,
        "the layer a quarter up is the target",
    ),
    "middle-3/4": (
        lambda first, last: first + 3 * (last - first) // 4,
        "the layer three quarters up is the target",
    ),
    "top": (lambda first, last: last, "the highest layer of a group is its target"),
}


def descriptions() -> dict[str, str]:
    """Every partition-position name with a one-line description."""
    return {
        f"{partition}-{position}": f"{rule.text}; {text}"
        for partition, rule in _PARTITIONS.items()
        for position, (_, text) in _POSITIONS.items()
    }


def help_rows() -> dict[str, str]:
    """The two halves of the names, for help texts: ``pizza-*``, ..., ``*-top``."""
    halves = {f"{partition}-*": rule.text for partition, rule in _PARTITIONS.items()}
    return {**halves, **{f"*-{name}": text for name, (_, text) in _POSITIONS.items()}}


def spelling() -> str:
    """All names in one short expression."""
    return f"{{{','.join(_PARTITIONS)}}}-{{{','.join(_POSITIONS)}}}"


def is_partition_name(name: str) -> bool:
    partition, _, position = name.partition("-")
    return partition in _PARTITIONS and position in _POSITIONS


def partition_map(name: str, num_layers: int, kv_layers: int | None) -> SharingMap:
    """The map of ``name`` with ``kv_layers`` KV layers (each group's target counts as one).

    Raises :class:`MapError` when the number of KV layers is missing or does not fit.
    """
    partition, _, position = name.partition("-")
    rule = _PARTITIONS[partition]
    least = min(rule.least_kv_layers, num_layers)
    if kv_layers is None or not least <= kv_layers <= num_layers:
        problem = "is needed by" if kv_layers is None else "is out of range for"
        fix = f"give a number from {least} to {num_layers} (--num-layers)"
        why = f"the number of KV layers {problem} {name}"
        raise MapError(Fault("--kv-layers", kv_layers, why, fix))
    target = _POSITIONS[position][0]
    sources: list[int] = []
    for first, last in rule.cut(num_layers, kv_layers):
        sources += [target(first, last)] * (last - first + 1)
    return SharingMap(tuple(sources), (False,) * num_layers)
