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


def draw_all(results: Results, folder: Path) -> None:
    """``table.md`` and one PNG per figure, into ``folder``."""
    if not results:
        return
    (folder / "table.md").write_text(table(results))
    loss_against_flops(results, folder / "loss_against_flops.png")
    for quantity, title in (
        ("loss_difference", "loss minus exact loss"),
        ("logit_difference", "mean |logit difference|"),
    ):
        prefill_error(results, quantity, title, folder / f"prefill_{quantity}.png")


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
    figure, axes = plt.subplots(figsize=(8, 5))
    markers = {"standard": "s", "pizza-bottom": "v", "sandwich-top": "o", "sandwich-middle": "^"}
    for result in (each for each in results.values() if not each["long"]):
        x, y = result["train_flops"] / 1e12, result["exact_loss"]
        axes.plot(x, y, markers[result["map"]], color="C0", alpha=0.8)
        label = result["recipe"] if result["recipe"] != "once" else result["map"]
        axes.annotate(f" {label}", (x, y), fontsize=8)
    for name, marker in markers.items():
        axes.plot([], [], marker, color="C0", label=name)
    axes.margins(x=0.15)
    axes.set(xlabel="training TFLOPs", ylabel="validation loss, exact evaluation")
    axes.legend()
    _save(figure, path)


def prefill_error(results: Results, quantity: str, title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5))
    points: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results.values():
        for row in result.get("prefill", []) if result["map"] == "sandwich-top" else []:
            points[row["stride"]][row["work"]].append(max(abs(row[quantity]), 1e-7))
    for color, (stride, by_work) in enumerate(sorted(points.items())):
        label = f"strided({stride})" if stride > 1 else "jacobi"
        works = sorted(by_work)
        middle = [statistics.median(by_work[work]) for work in works]
        axes.semilogy(works, middle, "o-", color=f"C{color}", label=label, markersize=4)
        for work in works:
            every = by_work[work]
            axes.semilogy([work] * len(every), every, ".", color=f"C{color}", alpha=0.3)
    axes.set(xlabel="layer-forwards over a standard prefill", ylabel=title)
    axes.set_title("sandwich-top, 3 KV layers: median and every trained model", fontsize=9)
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
