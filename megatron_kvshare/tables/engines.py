"""The table of engines: what one process needs under each, and what ZeRO-3 gathers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_kvshare.costs.memory import (
    TrainingLayout,
    TrainingMemory,
    kv_bytes,
    training_memory,
)
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.zero import Gathers, Zero, gathers, host_bytes, zero_memory
from megatron_kvshare.sharing.plan import ExecutionPlan

_MIB = 2**20
_TITLES = (
    *("engine", "weights", "grads", "optimizer", "activations", "KV", "logits", "buffers"),
    *("total", "host"),
)


def engine_lines(
    shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout, zero: Zero
) -> list[str]:
    """One line per engine and stage, the one that ``zero`` asks for marked; then what ZeRO-3
    gathers for layers that run several times.

    In MiB, estimated, without pipeline stages. ``KV``: keys and values that are kept for backward,
    apart from the other ``activations``; ``buffers``: weights that are gathered, gradients that are
    reduced; ``host``: what is offloaded.
    """
    rows = [_TITLES, *_rows(shape, plan, layout, zero)]
    replicas = layout.data_parallel_size
    title = f"Memory per process in MiB, estimated, with {replicas} data-parallel"
    return [
        f"{title} replica{'s' * (replicas > 1)}:",
        *_aligned(rows),
        *_gather_lines(gathers(shape, plan, layout.tensor_model_parallel_size), zero),
    ]


def _rows(
    shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout, zero: Zero
) -> Iterator[tuple[str, ...]]:
    kv = kv_bytes(shape, plan, layout)
    for name, sharded in (("megatron", False), ("megatron, distributed optimizer", True)):
        spread = replace(layout, use_distributed_optimizer=sharded)
        yield _row(name, training_memory(shape, plan, spread), kv)
    for stage in range(4):
        # Without a word of the file, only ZeRO-3 overlaps.
        other = replace(zero, stage=stage, overlaps_reduction=stage == 3)
        each, mark = (zero, " *") if stage == zero.stage else (other, "")
        memory = zero_memory(shape, plan, layout, each)
        host = host_bytes(shape, plan, layout, each)
        yield _row(f"deepspeed, ZeRO {stage}{mark}", memory, kv, memory.buffers, host)


def _row(
    name: str, memory: TrainingMemory, kv: int, buffers: int = 0, host: int = 0
) -> tuple[str, ...]:
    state = (memory.weights, memory.gradients, memory.optimizer)
    run = (memory.activations - kv, kv, memory.logits, buffers)
    numbers = (*state, *run, memory.total, host)
    return (name, *(f"{number / _MIB:,.0f}" for number in numbers))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _gather_lines(groups: Sequence[Gathers], zero: Zero) -> Iterator[str]:
    for each in groups:
        live = each.elements + zero.prefetch_bucket
        yield (
            f"ZeRO 3 gathers a layer of {each.first} to {each.last} up to {each.forward} times"
            f" forward and {each.backward} backward in a microbatch."
        )
        yield (
            f"It stays from sweep to sweep with stage3_max_reuse_distance {each.elements}"
            f" and stage3_max_live_parameters {live}, or more; auto fills them in."
        )
