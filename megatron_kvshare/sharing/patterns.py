"""From flags to a sharing map: every named pattern and explicit strings (no torch)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing import partitions
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.presets import PRESETS, Preset


def build_map(
    num_layers: int,
    pattern: str = "standard",
    kv_layers: int | None = None,
    kv_map: str | None = None,
) -> SharingMap:
    """The map that the flags ask for.

    ``pattern`` is a name of :func:`list_patterns`; ``kv_layers`` the number of KV layers ``l``
    (targets included), needed by the partition-position patterns only; ``kv_map`` an explicit
    string in their place. Raises :class:`MapError` listing every fault.
    """
    if num_layers < 1:
        rule = "a model has at least one layer"
        raise MapError(Fault("--num-layers", num_layers, rule, "give 1 or more"))
    faults: list[Fault] = []
    if kv_map is None:
        built = _attempt(lambda: _from_pattern(num_layers, pattern, kv_layers), faults)
    else:
        built = _attempt(lambda: SharingMap.parse(kv_map), faults)
        faults += _explicit_faults(built, num_layers, pattern, kv_map)
    if built is not None and kv_layers is not None and kv_layers != len(built.producers):
        source = pattern if kv_map is None else "the explicit map"
        rule = f"{source} has {len(built.producers)} KV layers"
        fix = "leave --kv-layers out, or choose a pattern that takes it, for example sandwich-top"
        faults.append(Fault("--kv-layers", kv_layers, rule, fix))
    if faults or built is None:
        raise MapError(faults)
    return built


def list_patterns() -> dict[str, str]:
    """Every pattern as it is written on the command line, with a one-line description."""
    return {**partitions.descriptions(), **_presets()}


def _presets() -> dict[str, str]:
    return {preset.written(name): preset.text for name, preset in PRESETS.items()}


def help_rows() -> dict[str, str]:
    """All patterns in few lines, for help texts."""
    return {**partitions.help_rows(), **_presets()}


def takes_kv_layers(pattern: str) -> bool:
    """Whether ``pattern`` is a partition-position name, which needs ``--kv-layers``."""
    return partitions.is_partition_name(pattern)


def window_faults(map: SharingMap, window_size: int | None) -> list[Fault]:
    """What is wrong with ``--window-size`` (tokens) for this map (empty when it is fine)."""
    windowed = [layer for layer, marked in enumerate(map.windowed) if marked]
    fix = "give --window-size W with W >= 1: token t sees tokens t-W+1 to t"
    if window_size is not None and window_size < 1:
        return [Fault("--window-size", window_size, "a window holds at least one token", fix)]
    if windowed and window_size is None:
        rule = f"{len(windowed)} layers of the map (the first is layer {windowed[0]}) use windows"
        return [Fault("--window-size", None, rule, fix)]
    return []


def warnings(map: SharingMap, window_size: int | None = None) -> list[str]:
    """Things that are allowed and probably not wanted, one sentence each."""
    found = []
    if not map.is_producer(0):
        found.append(
            f"layer 0 reads the KV of layer {map.sources[0]}; the published study found a "
            "significant drop in quality when layer 0 is not a KV layer (lasagna0-top and "
            "lasagna0-middle keep it one)"
        )
    if window_size is not None and not any(map.windowed):
        found.append("--window-size has no effect: no layer of this map uses a sliding window")
    blind = [i for i, marked in enumerate(map.windowed) if marked and map.is_upward(i)]
    if window_size == 1 and blind:
        found.append(f"with --window-size 1 the upward layers {blind} see no token at all")
    return found


def _attempt(build: Callable[[], SharingMap], faults: list[Fault]) -> SharingMap | None:
    try:
        return build()
    except MapError as error:
        faults += error.faults
        return None


def _explicit_faults(
    built: SharingMap | None, num_layers: int, pattern: str, kv_map: str
) -> list[Fault]:
    faults = []
    if built is not None and built.num_layers != num_layers:
        rule = f"the map has {built.num_layers} entries, the model {num_layers} layers"
        fix = f"give one entry per layer, or --num-layers {built.num_layers}"
        faults.append(Fault("--kv-map", kv_map, rule, fix))
    if pattern != "standard":
        rule = "an explicit --kv-map and a named pattern exclude each other"
        faults.append(Fault("--kv-pattern", pattern, rule, "give only one of them"))
    return faults


def _from_pattern(num_layers: int, pattern: str, kv_layers: int | None) -> SharingMap:
    name, colon, parameter = pattern.partition(":")
    if takes_kv_layers(name):
        if colon:
            rule = f"{name} takes no parameter after a colon"
            fix = f"use --kv-pattern {name} --kv-layers {parameter or 'l'}"
            raise MapError(Fault("--kv-pattern", pattern, rule, fix))
        return partitions.partition_map(name, num_layers, kv_layers)
    preset = PRESETS.get(name)
    if preset is None:
        raise MapError(_unknown(pattern, name))
    return preset.build(num_layers, _parameter(preset, num_layers, pattern))


def _parameter(preset: Preset, num_layers: int, pattern: str) -> int:
    name, colon, text = pattern.partition(":")
    if not preset.parameter:
        if colon:
            rule = f"{name} takes no parameter after a colon"
            raise MapError(Fault("--kv-pattern", pattern, rule, f"use --kv-pattern {name}"))
        return 0
    least, most = preset.bounds(num_layers)
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        rule = f"{name} takes a number {preset.parameter} from {least} to {most} after a colon"
        fix = f"write for example {name}:{min(max(preset.example, least), most)}"
        raise MapError(Fault("--kv-pattern", pattern, rule, fix))
    return int(text)


def _unknown(pattern: str, name: str) -> Fault:
    known = {written.partition(":")[0]: written for written in list_patterns()}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {known[near[0]]}? " if near else ""
    return Fault(
        "--kv-pattern",
        pattern,
        "there is no pattern of this name",
        f"{hint}known: {', '.join([partitions.spelling(), *_presets()])}; or any map with --kv-map",
    )
