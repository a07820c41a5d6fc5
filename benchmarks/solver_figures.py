"""Tables and figures of benchmarks/solvers.py, from what has been measured so far."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Results = dict[str, dict[str, Any]]

MARKERS = {"standard": "s", "pizza-bottom": "v", "sandwich-top": "o", "sandwich-middle": "^"}
LABELS = {
    "work": "layer-forwards over a standard prefill",
    "sweeps": "sweeps",
    "loss_difference": "|loss - exact loss|",
    "logit_difference": "mean |logit difference|",
}
FIGURES = (
    ("gap_against_sweeps", "sweeps", "loss_difference"),
    ("prefill_loss_difference", "work", "loss_difference"),
    ("prefill_logit_difference", "work", "logit_difference"),
)
"""File, horizontal and vertical quantity."""


def draw_all(results: Results, folder: Path) -> None:
    """``table.md`` and one PNG per figure, into ``folder``."""
    if not results:
        return
    (folder / "table.md").write_text(table(results))
    loss_against_flops(results, folder / "loss_against_flops.png")
    for name, x, quantity in FIGURES:
        solver_curves(results, x, quantity, folder / f"{name}.png")


def table(results: Results) -> str:
    """One row per map, recipe and length; seeds side by side."""
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = defaultdict(list)
    for result in results.values():
        groups[result["map"], result["recipe"], result["long"]].append(result)
    lines = [
        "| map | recipe | T | exact loss (seeds) | exact - iterated | training TFLOPs | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, recipe, long), rows in sorted(groups.items()):
        exact = " / ".join(f"{row['exact_loss']:.4f}" for row in rows)
        gap = " / ".join(f"{row['exact_loss'] - row['iterated_loss']:+.4f}" for row in rows)
        minutes = " / ".join(f"{row['train_seconds'] / 60:.0f}" for row in rows)
        flops = rows[0]["train_flops"] / 1e12
        cells = (name, recipe, "2048" if long else "512", exact, gap, f"{flops:.0f}", minutes)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def loss_against_flops(results: Results, path: Path) -> None:
    """One point per run: its form says the map, its colour the recipe."""
    figure, axes = plt.subplots(figsize=(8, 5))
    runs = [result for result in results.values() if not result["long"]]
    recipes = sorted({run["recipe"] for run in runs if run["recipe"] != "once"})
    colors = {"once": "black"} | {recipe: f"C{i}" for i, recipe in enumerate(recipes)}
    for run in runs:
        point = (run["train_flops"] / 1e12, run["exact_loss"])
        axes.plot(*point, MARKERS[run["map"]], color=colors[run["recipe"]], alpha=0.7)
    for name, marker in MARKERS.items():
        axes.plot([], [], marker, color="black", label=name)
    for recipe in recipes:
        axes.plot([], [], "-", linewidth=5, color=colors[recipe], label=recipe)
    axes.set(xlabel="training TFLOPs", ylabel="validation loss, exact evaluation")
    axes.legend(ncols=2)
    _save(figure, path)


def solver_curves(results: Results, x: str, quantity: str, path: Path) -> None:
    """How ``quantity`` falls with ``x``: a panel per map, a curve per stride."""
    maps = ("sandwich-top", "sandwich-middle")
    figure, panels = plt.subplots(1, len(maps), figsize=(11, 4.5), sharey=True)
    for name, axes in zip(maps, panels, strict=True):
        short = [run for run in results.values() if run["map"] == name and not run["long"]]
        _draw_strides(axes, [row for run in short for row in run["prefill"]], x, quantity)
        axes.set_title(f"{name}, 3 KV layers: median and each of {len(short)} models", fontsize=9)
        axes.set(xlabel=LABELS[x])
    panels[0].set(ylabel=LABELS[quantity])
    panels[0].legend()
    _save(figure, path)


def _draw_strides(axes: Any, rows: list[dict[str, Any]], x: str, quantity: str) -> None:
    points: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        points[row["stride"]][row[x]].append(max(abs(row[quantity]), 1e-7))
    for color, (stride, by_x) in enumerate(sorted(points.items())):
        label = f"strided({stride})" if stride > 1 else "jacobi"
        places = sorted(by_x)
        middle = [statistics.median(by_x[place]) for place in places]
        axes.semilogy(places, middle, "o-", color=f"C{color}", label=label, markersize=4)
        for place in places:
            every = by_x[place]
            axes.semilogy([place] * len(every), every, ".", color=f"C{color}", alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
