"""The stage table: what every pipeline stage holds, computes and sends."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_kvshare.costs.weights import stage_parameters
from megatron_kvshare.costs.work import training_flops_by_layer
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.stages.layout import LAYOUT_FLAG, layout_text, proposed_layout, slowest_stage
from megatron_kvshare.stages.placement import PayloadShape, Placement, Stage
from megatron_kvshare.stages.traffic import FLOPS_PER_BYTE, bytes_sent, cut_traffic

_TITLES = (
    *("stage", "rank", "layers", "makes KV", "receives", "forwards", "parameters", "work"),
    "sends",
)


def stage_lines(plan: ExecutionPlan, placement: Placement, payload: PayloadShape) -> list[str]:
    """One line per stage, and the layout that would be fastest; empty on one pipeline rank.

    ``work``: training FLOPs over those of a mean stage; ``sends``: bytes of a microbatch to other
    stages from each tensor-parallel rank, without the gradients that come back.
    """
    if placement.ranks == 1:
        return []
    work = stage_work(plan, placement, payload)
    mean = sum(work) / len(work)
    sent = bytes_sent(plan, placement, payload)
    rows = [
        _row(placement, stage, payload, f"{share / mean:.2f}", f"{size:,} B" if size else "-")
        for stage, share, size in zip(placement.stages, work, sent, strict=True)
    ]
    return [*_aligned([_TITLES, *rows]), *_notes(plan, placement, payload)]


def stage_work(plan: ExecutionPlan, placement: Placement, payload: PayloadShape) -> list[int]:
    """Training FLOPs of a sequence in every stage, the head with the last."""
    layers = training_flops_by_layer(payload.model, plan)
    return [sum(layers[stage.first : stage.stop]) for stage in placement.stages]


def _row(
    placement: Placement, stage: Stage, payload: PayloadShape, work: str, sends: str
) -> tuple[str, ...]:
    sharing = placement.map
    rank = f"{stage.rank}" if placement.chunks == 1 else f"{stage.rank}.{stage.chunk}"
    makes = [layer for layer in stage.layers if sharing.is_producer(layer)]
    layers = f"{stage.first}-{stage.stop - 1}" if len(stage.layers) > 1 else f"{stage.first}"
    layers = "embedding, " * stage.embeds + layers + ", head" * stage.predicts
    parameters = f"{stage_parameters(payload.model, sharing, stage):,}"
    lists = (_numbers(each) for each in (makes, stage.receives, stage.forwards))
    return (str(stage.number), rank, layers, *lists, parameters, work, sends)


def _numbers(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers)) or "-"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    numbers = range(_TITLES.index("parameters"), len(_TITLES))
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _notes(plan: ExecutionPlan, placement: Placement, payload: PayloadShape) -> list[str]:
    notes = [
        f"The cyclic group of layers {first} to {last} spans stages: its sweeps go round them."
        for first, last in placement.spanning_groups
    ]
    flops = training_flops_by_layer(payload.model, plan)
    work = [each / payload.seq_length for each in flops]  # per token, as the bytes are
    transport = [FLOPS_PER_BYTE * size for size in cut_traffic(plan, payload)]
    best = proposed_layout(work, len(placement.layout), transport)
    here, there = (slowest_stage(each, work, transport) for each in (placement.layout, best))
    if there < here:
        notes.append(
            f"{LAYOUT_FLAG} {layout_text(best)} would make the slowest stage {1 - there / here:.0%}"
            f" faster, a sent byte counted as {FLOPS_PER_BYTE} FLOPs."
        )
    return notes
