"""What workers do in the suite of the DeepSpeed engine: train by either engine, and report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.engines import deepspeed
from megatron_kvshare.engines.deepspeed import DeepSpeedEngine
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.parameters import gather_by_name
from megatron_kvshare.pipeline.runner import counted_tokens
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.step import train_step
from tests.distributed.jobs import Case
from tests.distributed.world import Layout


class Outcome(NamedTuple):
    """Of a run: of every step the loss and the norm; the weights after it, by canonical name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def unequally_masked(batches: Iterator[Batch]) -> Iterator[Batch]:
    """A number of tokens that differs from sequence to sequence does not count; which, their own
    content says, so that it is the same on every layout."""
    for batch in batches:
        place = torch.arange(batch.tokens.shape[1])
        every = 2 + batch.tokens[:, :1] % 5
        kept = (batch.tokens + place) % every != 0
        yield batch._replace(loss_mask=batch.loss_mask * kept)


def train(state: ParallelState, layout: Layout, case: Case) -> Outcome:
    run = prepare(case.planned(layout), state)
    batches = unequally_masked(run.data.train_batches(0))
    results = [train_step(run, batches, number) for number in range(1, case.steps + 1)]
    return outcome(run, results)


def outcome(run: Run, results: list[Any]) -> Outcome:
    with run.engine.whole_weights():
        weights = gather_by_name(run.engine.stages, run.state)
    return Outcome([each.loss for each in results], [each.grad_norm for each in results], weights)


class Held(NamedTuple):
    """Elements on one rank after a step: of all its local weights, of those that are whole between
    two steps, of those that this rank updates, and of AdamW's two moments."""

    weights: int
    whole: int
    updated: int
    moments: int


def held(state: ParallelState, layout: Layout, case: Case) -> Held:
    run = prepare(case.planned(layout), state)
    engine = run.engine
    assert isinstance(engine, DeepSpeedEngine)
    train_step(run, run.data.train_batches(0), 1)
    states = engine.shares.adamw.state.values()
    return Held(
        sum(getattr(weight, "ds_numel", weight.numel()) for weight in engine.weights),
        sum(weight.numel() for weight in engine.weights),
        sum(each.size for each in map(engine.shares.share, engine.weights) if each),
        sum(each[name].numel() for each in states for name in ("exp_avg", "exp_avg_sq")),
    )


def _without_sum_over_tp(engine: DeepSpeedEngine) -> float:
    def reduced(tensor: Tensor, group: Any) -> Tensor:
        return tensor if group is engine._state.tp_group else plain(tensor, group)

    plain = deepspeed.all_reduce_
    with mock.patch.object(deepspeed, "all_reduce_", reduced):
        return gradient_norm(engine)


gradient_norm = DeepSpeedEngine.gradient_norm

TRAPS = {
    "the norm without what other tensor-parallel ranks hold": (
        DeepSpeedEngine,
        "gradient_norm",
        _without_sum_over_tp,
    ),
    "gradients of norms under sequence parallelism left apart": (
        deepspeed,
        "sum_over_sequence_ranks",
        lambda weights, state: None,
    ),
    "the mean of the means of ranks": (
        DeepSpeedEngine,
        "_loss_scale",
        lambda engine, batches: 1 / sum(counted_tokens(batch).sum() for batch in batches),
    ),
}


def train_in_trap(state: ParallelState, layout: Layout, case: Case, trap: str) -> Outcome:
    """The same run by an engine that has fallen into it."""
    with mock.patch.object(*TRAPS[trap]):
        return train(state, layout, case)
