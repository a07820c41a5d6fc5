"""Rows as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from megatron_kvshare.bench.bound import Rates
from megatron_kvshare.bench.study import Row

LEGEND = (
    "b: best batch, of the largest that fits; x: over the standard map; prompts: seconds for those"
    " of the batch; ms: of a step of decoding, which gives each sequence a token; bound: the share"
    " of the least time that was reached; same b: ms of a step at the standard map's largest batch."
)


def table(rows: Sequence[Row]) -> Table:
    """One line per map, one block per pair of lengths."""
    drawn = Table(box=None, pad_edge=False)
    drawn.add_column("map", overflow="fold")
    for title in ("KV", "b", "tokens/s", "x", "prompts", "ms", "bound", "same b"):
        drawn.add_column(title, justify="right", no_wrap=True)
    for lengths in dict.fromkeys((row.prompt, row.generated) for row in rows):
        drawn.add_row("{}+{}".format(*lengths), style="bold")
        for row in rows:
            if (row.prompt, row.generated) == lengths:
                drawn.add_row(*_cells(row))
    return drawn


def _cells(row: Row) -> tuple[str, ...]:
    same = row.same_batch_decode_seconds_per_token
    return (
        row.family,
        str(row.kv_layers),
        f"{row.batch} of {row.max_batch}",
        f"{row.tokens_per_second:,.0f}",
        "" if row.over_standard is None else f"{row.over_standard:.2f}",
        f"{row.prefill_seconds:.3g}",
        f"{1e3 * row.decode_seconds_per_token:.3g}",
        f"{row.decode_of_bound:.0%}",
        "" if same is None else f"{1e3 * same:.3g}",
    )


def rates_text(rates: Rates) -> str:
    """What the bounds are made of."""
    return (
        f"Measured here: {rates.bytes_per_second / 1e9:,.1f} GB/s read,"
        f" {rates.flops_per_second / 1e12:,.3g} TFLOP/s."
    )
