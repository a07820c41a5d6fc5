"""Draws a plan, in 80 columns, for the terminal and for the cards of exports (no torch)."""

from __future__ import annotations

from rich import box
from rich.table import Table

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan, Segment, StepMode, Sweep

_BRACKET = {"first": "╭", "inside": "│", "last": "╰", "up": "↑", "down": "↓"}
_BRACKET_ASCII = {"first": "+", "inside": "|", "last": "+", "up": "up", "down": "down"}
_STYLES = {"producer": "bold green", "upward": "yellow", "consumer": ""}
_LESS_THAN_FULL = {StepMode.NO_ATTENTION: "without attention", StepMode.KV_ONLY: "only K and V"}


def role(map: SharingMap, layer: int) -> str:
    """``producer``, ``upward`` (a consumer of a higher layer) or ``consumer``."""
    if map.is_producer(layer):
        return "producer"
    return "upward" if map.is_upward(layer) else "consumer"


def map_table(
    plan: ExecutionPlan, window_size: int | None = None, ascii_only: bool = False
) -> Table:
    """One row per layer: its role, whose keys and values it reads, its group, how often it runs."""
    signs = _BRACKET_ASCII if ascii_only else _BRACKET
    windows = any(plan.map.windowed)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("role")
    table.add_column("keys and values")
    if windows:
        table.add_column("attention")
    if plan.groups:
        table.add_column("group")
    table.add_column("runs")
    for segment in plan.segments:
        for layer in range(segment.first, segment.last + 1):
            kind = role(plan.map, layer)
            cells = [str(layer), kind, _reads(plan.map, layer, signs)]
            if windows:
                cells.append(_attention(plan.map, layer, window_size))
            if plan.groups:
                cells.append(_bracket(segment, layer, signs))
            table.add_row(*cells, _runs(segment, layer), style=_STYLES[kind])
    return table


def sweeps_text(plan: ExecutionPlan) -> str:
    """How the cyclic groups are computed, in a sentence or two."""
    if not plan.groups:
        return "No layer reads a higher one: every layer runs once, as in a standard model."
    spans = ", ".join(f"{segment.first}-{segment.last}" for segment in plan.groups)
    which = f"{len(plan.groups)} cyclic groups" if len(plan.groups) > 1 else "1 cyclic group"
    sweeps = plan.groups[0].sweeps
    gradient = sum(sweep.gradient for sweep in sweeps)
    count = len(sweeps) - gradient
    text = f"{gradient} sweep{'s' * (gradient != 1)} with gradient"
    if count:
        text = f"{count} sweep{'s' * (count != 1)} without gradient, then {gradient} with"
    limits = [sweep.skip_below for sweep in sweeps if sweep.skip_below is not None]
    if limits:
        text = f"up to {text}; one is left out at a KV residual of {limits[0]:g}"
    return f"{which}: layers {spans}. {text}; {_who_reads_what(sweeps[-1])}."


def _who_reads_what(sweep: Sweep) -> str:
    if sweep.stride == 1:
        return "upward layers read the keys and values of the sweep before"
    return (
        f"a sweep visits the tokens in {sweep.stride} interleaved subsets, one after another, and"
        " upward layers read the newest keys and values there are"
    )


def _reads(map: SharingMap, layer: int, signs: dict[str, str]) -> str:
    if map.is_producer(layer):
        readers = len(map.consumers_of(layer))
        return f"own, read by {readers} more" if readers else "own"
    direction = signs["up" if map.is_upward(layer) else "down"]
    return f"of layer {map.sources[layer]} {direction}"


def _attention(map: SharingMap, layer: int, window_size: int | None) -> str:
    if not map.windowed[layer]:
        return "full"
    return f"window {'?' if window_size is None else window_size}"


def _bracket(segment: Segment, layer: int, signs: dict[str, str]) -> str:
    if not segment.is_cyclic:
        return ""
    if layer == segment.first:
        return signs["first"]
    return signs["last" if layer == segment.last else "inside"]


def _runs(segment: Segment, layer: int) -> str:
    """``9 (1 MLP only)``: how often a layer runs, and how often only a part of it."""
    modes = [_mode_in(sweep, layer) for sweep in segment.sweeps]
    parts = [
        f"{modes.count(mode)} {text}" for mode, text in _LESS_THAN_FULL.items() if mode in modes
    ]
    return f"{len(modes)} ({', '.join(parts)})" if parts else str(len(modes))


def _mode_in(sweep: Sweep, layer: int) -> StepMode:
    """What a sweep needs of a layer, as the last subset of tokens shows."""
    steps = (*sweep.finish, *sweep.visits[-1].steps)
    return next(step.mode for step in steps if step.layer == layer)
