"""What ``kvshare plan`` says of costs, in 80 columns."""

from __future__ import annotations

from rich import box
from rich.table import Table

from megatron_kvshare.costs import cost
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import CONVERGED_PREFILL, RECIPES, solver_plan

_BINARY = ("", "Ki", "Mi", "Gi", "Ti")
_DECIMAL = ("", "K", "M", "G", "T", "P", "E")


def cost_table(shape: ModelShape, plan: ExecutionPlan) -> Table:
    """What the map costs beside the standard map of the same shape."""
    ours = cost.costs(shape, plan)
    base = cost.costs(shape, cost.standard_plan(shape.num_layers))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cost")
    for title in ("this map", "standard", "ratio"):
        table.add_column(title, justify="right")

    def row(name: str, mine: float, standard: float, unit: str, ratio: float) -> None:
        table.add_row(name, _quantity(mine, unit), _quantity(standard, unit), f"{ratio:.2f}")

    row("parameters", ours.parameters, base.parameters, "", ours.parameters / base.parameters)
    bytes_ratio = 1 / ours.kv_reduction
    row(
        "KV cache per token, 16 bit",
        ours.kv_bytes_per_token,
        base.kv_bytes_per_token,
        "B",
        bytes_ratio,
    )
    row(
        "training FLOPs per token",
        ours.train_flops_per_token,
        base.train_flops_per_token,
        "",
        ours.train_flops_ratio,
    )
    prompt = f"prefill FLOPs, {shape.seq_length} tokens"
    row(prompt, ours.prefill_flops, base.prefill_flops, "", ours.prefill_flops_ratio)
    table.add_row("training factor, no skipping", "", "", f"{ours.train_factor:.2f}")
    table.add_row("prefill factor, no skipping", "", "", f"{ours.prefill_factor:.2f}")
    table.add_row("sequential depth of prefill", "", "", f"{ours.sequential_depth:.2f}")
    return table


def recipe_table(shape: ModelShape, sharing_map: SharingMap) -> Table:
    """The named recipes side by side, all over the standard map: training FLOPs, layer-forwards of
    training, prefill FLOPs, layers one after another in a prefill."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("recipe", "sweeps"):
        table.add_column(title, no_wrap=True)
    for title in ("train FLOPs", "layers", "prefill", "depth"):
        table.add_column(title, justify="right")
    for name, recipe in RECIPES.items():
        its = cost.costs(shape, solver_plan(sharing_map, recipe))
        numbers = (its.train_flops_ratio, its.train_work, its.prefill_flops_ratio)
        cells = [f"{number:.2f} x" for number in (*numbers, its.sequential_depth)]
        table.add_row(name, str(recipe), *cells)
    return table


def prefill_text(shape: ModelShape, sharing_map: SharingMap) -> str:
    """The fastest prefill with the loss of exact evaluation."""
    its = cost.costs(shape, solver_plan(sharing_map, CONVERGED_PREFILL))
    return (
        f"Converged prefill (the loss of exact): {CONVERGED_PREFILL},"
        f" {its.prefill_flops_ratio:.2f} x a standard prefill's FLOPs."
    )


def _quantity(value: float, unit: str) -> str:
    """Three digits with a decimal prefix, or with a binary one for bytes."""
    base, prefixes = (1024, _BINARY) if unit == "B" else (1000, _DECIMAL)
    power = 0
    while value >= base and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    number = f"{value:.0f}" if power == 0 or value >= 100 else f"{value:#.3g}"
    return f"{number} {prefixes[power]}{unit}".strip()
