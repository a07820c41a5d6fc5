"""What a task of :mod:`megatron_kvshare.stages.tasks` computes, on the model stage it belongs
to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_kvshare.megatron_api.loss import TokenLosses
from megatron_kvshare.model.block import StageTensors
from megatron_kvshare.model.context import SequenceContexts
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.kv import KV, KVBlocks, join_tokens, residual, split_tokens
from megatron_kvshare.sharing.plan import Carry, ExecutionPlan
from megatron_kvshare.stages.tasks import (
    CarryTask,
    EmbedTask,
    FinishTask,
    HeadTask,
    Key,
    LayersTask,
    Sources,
    Task,
    VisitTask,
)

Tensors = tuple[torch.Tensor, ...]
Values = Mapping[Key, Tensors]
"""Hidden states and inputs are one tensor, KV a key and a value."""


class Microbatch(NamedTuple):
    """What every stage knows of a microbatch: tokens, labels, which of them count, each
    ``[b, s]``, and contexts."""

    token_ids: torch.Tensor
    labels: torch.Tensor
    counted: torch.Tensor
    contexts: SequenceContexts


class TaskOutput(NamedTuple):
    """``residual``: rows of the task's sweep and segment, of targets that were renewed here."""

    made: Values
    losses: TokenLosses | None = None
    residuals: torch.Tensor | None = None


def run_task(
    task: Task, model: KVShareGPT, batch: Microbatch, values: Values, measure: bool
) -> TaskOutput:
    """Compute what ``task`` makes of ``values``, under the caller's autograd mode."""
    match task:
        case EmbedTask():
            assert model.embedding is not None
            return TaskOutput({task.makes[0]: (model.embedding(batch.token_ids),)})
        case LayersTask():
            return _layers(task, model, batch, values, measure)
        case CarryTask():
            return _carry(task, model, batch, values)
        case VisitTask():
            return _visit(task, model, batch, values, measure)
        case FinishTask():
            return _finish(task, model, batch, values)
        case HeadTask():
            (hidden,) = values[task.hidden]
            return TaskOutput({}, losses=model.losses(hidden, batch.labels, batch.counted))
    raise TypeError(task)


def _layers(
    task: LayersTask, model: KVShareGPT, batch: Microbatch, values: Values, measure: bool
) -> TaskOutput:
    (hidden,) = values[task.hidden]
    entering = StageTensors(hidden, _whole(task.outside, values))
    plan = ExecutionPlan(model.plan.map, (task.segment,))
    output = model.decoder(entering, batch.contexts, plan, measure)
    leaving = output.leaving
    made: dict[Key, Tensors] = {}
    for key in task.makes:
        made[key] = tuple(leaving.kv[key.layer]) if key.what == "kv" else (leaving.hidden,)
    rows = None if output.residuals is None else output.residuals[0]
    return TaskOutput(made, residuals=rows)


def _carry(task: CarryTask, model: KVShareGPT, batch: Microbatch, values: Values) -> TaskOutput:
    made: dict[Key, Tensors] = {}
    for producer, keys in task.inputs.items():
        parts: Sequence[torch.Tensor] = [part for key in keys for part in values[key]]
        if task.sweep.carry is Carry.GROUP_INPUT:
            parts = split_tokens(parts[0], task.sweep.stride)
        blocks = model.decoder.sweeps.projected(producer, parts, batch.contexts).known
        mine = [key for key in task.makes if key.layer == producer]
        made |= {key: tuple(block) for key, block in zip(mine, blocks, strict=True)}
    return TaskOutput(made)


def _visit(
    task: VisitTask, model: KVShareGPT, batch: Microbatch, values: Values, measure: bool
) -> TaskOutput:
    stride, offset = task.sweep.stride, task.visit.offset
    (hidden,) = values[task.hidden]
    if task.hidden.layer < task.segment.first:  # all tokens enter the group
        hidden = split_tokens(hidden, stride)[offset].contiguous()
    kv = {p: KVBlocks.of(whole, stride) for p, whole in _whole(task.outside, values).items()}
    kv |= {producer: _blocks(keys, values) for producer, keys in task.kv.items()}
    context = batch.contexts.visit(stride, offset)
    output = model.decoder.sweeps.run_visit(task.visit, hidden, kv, context)
    made: dict[Key, Tensors] = {}
    for key in task.makes:
        if key.what == "kv":
            made[key] = tuple(output.kv[key.layer].block(offset))
        elif key.what == "input":
            made[key] = (output.inputs[key.layer].detach(),)
        else:
            made[key] = (output.hidden,)
    return TaskOutput(made, residuals=_moved(task, made, values) if measure else None)


def _moved(task: VisitTask, made: Values, values: Values) -> torch.Tensor | None:
    """How far the visit moved the targets' KV."""
    if not task.old:
        return None
    new = {key.layer: KVBlocks((KV(*made[key]),)) for key in task.makes if key.what == "kv"}
    old = {p: KVBlocks((KV(*values[key]),)) for p, key in task.old.items() if key is not None}
    return residual(new, old, task.old)


def _finish(task: FinishTask, model: KVShareGPT, batch: Microbatch, values: Values) -> TaskOutput:
    hidden = join_tokens([values[key][0] for key in task.hidden])
    kv = {task.step.layer: _blocks(task.kv, values)}
    finished = model.decoder.sweeps.finish(task.step, hidden, kv, batch.contexts)
    return TaskOutput({task.makes[0]: (finished,)})


def _blocks(keys: tuple[Key | None, ...], values: Values) -> KVBlocks:
    return KVBlocks(tuple(None if key is None else KV(*values[key]) for key in keys))


def _whole(sources: Sources, values: Values) -> dict[int, KV]:
    return {producer: _blocks(keys, values).whole() for producer, keys in sources.items()}
