"""Flags that make a run need less memory, with what each does to the estimate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.config.pretrain import layout_faults
from megatron_kvshare.costs.memory import TrainingMemory
from megatron_kvshare.megatron_api.memory import Shortage
from megatron_kvshare.sharing.solver import DEFAULT_RECIPE
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.report import mib
from megatron_kvshare.train.watchdog import (
    BUILDING,
    COMPILING,
    LOADING,
    SAVING,
    SETTING_UP,
    VALIDATION,
)

_EXPANDABLE = "expandable_segments:True"
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_NOTHING_LEFT = "a smaller model, a shorter --seq-length, or devices with more memory"


class Job(NamedTuple):
    """What ran out, and ``what`` it was doing."""

    planned: RunPlan
    spec: ModelSpec
    what: str


class _Change(NamedTuple):
    """``flags`` and the configuration with them; ``remark``: what else a user has to know."""

    flags: str
    config: PretrainConfig
    remark: str = ""


def advice(job: Job, found: Shortage) -> list[str]:
    """What would help, from what costs the training least; only what is not in use yet, passes the
    rules, and lowers the estimate of what was held when memory ran out."""
    now = job.planned
    lines = list(_of_host(now.config) if found.on_host else _of_allocator(found))
    before = _held(now.memory(job.spec), job.what)
    for change in _changes(job):
        size = _processes(change.config, now.world_size)
        if size is None:
            continue
        planned, flags = _same_batch(now, change, size)
        memory = planned.memory(planned.spec(job.spec.vocab_size))
        if _held(memory, job.what) < before:
            where = "" if size == now.world_size else f" on {size} processes"
            lines.append(f"{flags}{where}: {mib(memory.total)}{change.remark}")
    return lines or [_NOTHING_LEFT]


def _held(memory: TrainingMemory, what: str) -> int:
    """Bytes that are held while a rank does this: activations in training only."""
    state = memory.weights + memory.gradients + memory.optimizer
    if what in (SETTING_UP, COMPILING, BUILDING, LOADING, SAVING):
        return state
    return state + memory.logits if what == VALIDATION else memory.total


def _of_allocator(found: Shortage) -> Iterator[str]:
    if found.fragmented and not any(_EXPANDABLE in os.environ.get(name, "") for name in _ALLOCATOR):
        yield f"{_ALLOCATOR[0]}={_EXPANDABLE} before the command: torch holds enough, in pieces"


def _of_host(config: PretrainConfig) -> Iterator[str]:
    if config.checkpoint.async_save:
        yield "no --async-save: it keeps a copy of what is saved in host memory"
    if config.data.num_workers:
        yield "--num-workers 0: each worker is a process of its own"


def _changes(job: Job) -> Iterator[_Change]:
    """Candidates: first those that change no result, then more processes, then other results."""
    config = job.planned.config
    micro = config.train.micro_batch_size
    smaller = next((size for size in range(micro // 2, 0, -1) if micro % size == 0), None)
    if smaller is not None:
        yield _changed(config, "train", "", micro_batch_size=smaller)
    if config.model.recompute_granularity != "full":
        remark = ", for about a third more computation"
        yield _changed(config, "model", remark, recompute_granularity="full")
    parallel = config.parallel
    if not parallel.use_distributed_optimizer:
        yield _changed(config, "parallel", "", use_distributed_optimizer=True)
    yield _changed(
        config, "deepspeed", "", zero_stage=min(3, (config.deepspeed.zero_stage or 0) + 1)
    )
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if not parallel.sequence_parallel:
        yield _changed(config, "parallel", "", sequence_parallel=True)
    more: dict[str, Any] = {"tensor_model_parallel_size": 2 * tensor}
    if not parallel.sequence_parallel:
        more["sequence_parallel"] = True
    yield _changed(config, "parallel", "", **more)
    yield _changed(config, "parallel", "", pipeline_model_parallel_size=2 * stages)
    if not config.model.bf16:
        yield _changed(config, "model", ", with bf16's rounding", bf16=True)
    yield from _fewer_sweeps(job.planned)


def _fewer_sweeps(planned: RunPlan) -> Iterator[_Change]:
    """Activations are kept for every sweep with gradient."""
    config, sharing = planned.config, planned.config.sharing
    if not planned.plan.groups or planned.recipe.backward_sweeps == 1:
        return
    remark = ", and another way to train"
    if sharing.kv_recipe is not None and sharing.kv_backward_sweeps is None:
        yield _changed(config, "sharing", remark, kv_recipe=DEFAULT_RECIPE)
    else:
        yield _changed(config, "sharing", remark, kv_backward_sweeps=1)


def _changed(config: PretrainConfig, group: str, remark: str, **settings: Any) -> _Change:
    words = []
    for name, value in settings.items():
        words += [flag_of(name), *([] if value is True else [str(value)])]
    part = replace(getattr(config, group), **settings)
    return _Change(" ".join(words), replace(config, **{group: part}), remark)


def _processes(config: PretrainConfig, world_size: int) -> int | None:
    """How many processes to run ``config`` on: as many as now, or twice as many; None: neither."""
    sizes = (world_size, 2 * world_size)
    return next((size for size in sizes if not any(layout_faults(config, size))), None)


def _same_batch(now: RunPlan, change: _Change, world_size: int) -> tuple[RunPlan, str]:
    """The change with the global batch of now, which may have followed from the layout."""
    planned, batch = RunPlan.of(change.config, world_size), now.batch.global_batch_size
    if planned.batch.global_batch_size == batch:
        return planned, change.flags
    train = replace(change.config.train, global_batch_size=batch)
    planned = RunPlan.of(replace(change.config, train=train), world_size)
    return planned, f"{change.flags} --global-batch-size {batch}"
