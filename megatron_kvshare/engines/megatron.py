"""Megatron-core's data parallelism, schedules and AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_kvshare.checkpoint.load import Found, load_checkpoint
from megatron_kvshare.checkpoint.save import Content, content
from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.megatron_api.optimizer import (
    build_optimizer,
    build_scheduler,
    gathered_parameters,
    gradient_norm,
    set_learning_rate,
    update_parameters,
    wrap_stages,
    zero_gradients,
)
from megatron_kvshare.megatron_api.optimizer_state import MegatronOptimizerState
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.pipeline.runner import BatchRunner, Pass, Sums
from megatron_kvshare.pipeline.schedule_runner import ScheduleRunner
from megatron_kvshare.pipeline.task_runner import TaskRunner
from megatron_kvshare.spec.run_plan import RunPlan


class MegatronEngine:
    """An :class:`~megatron_kvshare.engines.engine.Engine`; ``stages`` have their first weights."""

    def __init__(
        self, planned: RunPlan, stages: Sequence[KVShareGPT], state: ParallelState
    ) -> None:
        config = planned.config
        self.stages = stages
        self.models = wrap_stages(stages, config.parallel)
        self.optimizer = build_optimizer(
            self.models, config.train, config.parallel, config.model.bf16
        )
        self.scheduler = build_scheduler(self.optimizer, config.train)
        self.runner = self._batch_runner(planned, state)
        self._optimizer_state = MegatronOptimizerState(self.optimizer)
        self._num_microbatches = planned.batch.num_microbatches
        self._clip_grad = config.train.clip_grad
        self._state = state

    def _batch_runner(self, planned: RunPlan, state: ParallelState) -> BatchRunner:
        placement, payload = planned.placement, planned.payload(self.stages[0].spec)
        if placement.spanning_groups:
            count = planned.batch.num_microbatches
            return TaskRunner(placement, self.models, state, payload, count)
        return ScheduleRunner.of(self.models, placement, payload)

    def forward_backward(self, batches: Iterator[Batch], how: Pass) -> Sums:
        zero_gradients(self.models, self.optimizer)
        return self.runner.run(batches, self._num_microbatches, how).over_ranks(self._state)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], how: Pass, global_batches: int) -> Sums:
        count = global_batches * self._num_microbatches
        how = how._replace(forward_only=True)
        return self.runner.run(batches, count, how).over_ranks(self._state)

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        return gathered_parameters(self.models)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return self.whole_weights()  # with overlap they would be gathered for every microbatch

    def set_learning_rate(self, step: int) -> float:
        return set_learning_rate(self.scheduler, step)

    def gradient_norm(self) -> float:
        return gradient_norm(self.models, self.optimizer)

    def update(self, grad_norm: float) -> None:
        update_parameters(self.models, self.optimizer, self._clip_grad, grad_norm)

    @contextlib.contextmanager
    def state_shards(self, with_optimizer: bool) -> Iterator[Content]:
        optimizer = self._optimizer_state if with_optimizer else None
        with self.whole_weights():
            yield content(self.stages, optimizer, self._state)

    def load(self, found: Found) -> None:
        load_checkpoint(found, self.stages, self._optimizer_state, self._state)
