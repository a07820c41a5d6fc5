"""The paper's figures: throughput against the number of KV layers, and the latency of a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from megatron_kvshare.bench.study import Row

FIGURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "throughput": (
        "tokens/s of prompt + generation, best batch",
        lambda row: row.tokens_per_second,
    ),
    "prefill_latency": ("seconds to the first token of one prompt", lambda row: row.ttft_seconds),
}
"""File, vertical axis, quantity."""


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """PNG files in ``folder``: a panel per pair of lengths, a line per family of maps, which begins
    at the standard map."""
    paths = []
    for name, (label, quantity) in FIGURES.items():
        path = folder / f"{name}.png"
        figure = _panels(rows, label, quantity)
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths


def _panels(rows: Sequence[Row], label: str, quantity: Callable[[Row], float]) -> Figure:
    lengths = list(dict.fromkeys((row.prompt, row.generated) for row in rows))
    width = 4.5 * len(lengths)
    figure, grid = plt.subplots(1, len(lengths), figsize=(width, 4), squeeze=False)
    for pair, axes in zip(lengths, grid[0], strict=True):
        part = [row for row in rows if (row.prompt, row.generated) == pair]
        _lines(axes, part, quantity)
        axes.set(title="{} + {} tokens".format(*pair), xlabel="KV layers", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.tight_layout()
    return figure


def _lines(axes: Any, rows: Sequence[Row], quantity: Callable[[Row], float]) -> None:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    (base, *_) = rows
    for family, members in families.items():
        joined = members if family == base.family else [*members, base]
        joined = sorted(joined, key=lambda row: row.kv_layers)
        points = [(row.kv_layers, quantity(row)) for row in joined]
        style = {"marker": "s", "color": "black"} if family == base.family else {"marker": "o"}
        order = 3 if family == base.family else 2  # where all lines meet, it is the one seen
        axes.plot(*zip(*points, strict=True), label=family, zorder=order, **style)
