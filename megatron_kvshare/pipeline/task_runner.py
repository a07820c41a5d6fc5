"""Forward and backward of a global batch where cyclic groups span pipeline stages: the tasks
of their sweeps go round the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api.optimizer import Models
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.megatron_api.schedule import finalize_gradients
from megatron_kvshare.model.block import plan_residuals
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.pipeline.executor import Shapes, StageExecutor
from megatron_kvshare.pipeline.runner import Pass, Sums, counted_tokens
from megatron_kvshare.pipeline.stage_tasks import Microbatch, TaskOutput
from megatron_kvshare.pipeline.transport import Transport
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.stages.messages import Message, MessagePlan
from megatron_kvshare.stages.order import Action, best_schedule
from megatron_kvshare.stages.placement import PayloadShape, Placement
from megatron_kvshare.stages.task_cost import task_graph
from megatron_kvshare.stages.tasks import Key, LayersTask, SweepTask, Task
from megatron_kvshare.stages.traffic import tokens_of


@dataclass
class TaskRunner:
    """The :class:`~megatron_kvshare.pipeline.runner.BatchRunner` of groups that span stages.

    ``models``: this rank's stages, wrapped for data parallelism; one order of tasks is made for a
    global batch of ``num_microbatches``; ``schedules``: those made so far, by plan and length.
    """

    placement: Placement
    models: Models
    state: ParallelState
    payload: PayloadShape
    num_microbatches: int
    schedules: dict[tuple[Any, ...], MessagePlan] = field(default_factory=dict)

    def message_plan(
        self, plan: ExecutionPlan, microbatches: int, forward_only: bool
    ) -> MessagePlan:
        """Who runs what when, and what goes where; the same on all ranks."""
        key = (plan, microbatches, forward_only)
        if key not in self.schedules:
            graph = task_graph(self.payload.model, plan, self.placement)
            timed = best_schedule(graph, microbatches, forward_only)
            order = [[each.action for each in rank] for rank in timed]
            self._check_that_ranks_agree(order)
            self.schedules[key] = MessagePlan(graph, order, forward_only)
        return self.schedules[key]

    def _check_that_ranks_agree(self, order: Sequence[Sequence[Action]]) -> None:
        """Messages carry no names: with another order on one rank values would change places.

        Raises:
            ConfigError: on every rank, where the program is not the same everywhere.
        """
        mine = hashlib.sha256(repr(order).encode()).hexdigest()
        everyone = [mine] * self.state.pp_size
        dist.all_gather_object(everyone, mine, group=self.state.pp_group)
        if len(set(everyone)) > 1:
            rule = "pipeline ranks derive different orders of tasks from the same settings"
            fix = "install the same version of megatron_kvshare on every node"
            raise ConfigError(Fault("pipeline ranks", everyone, rule, fix))

    @cached_property
    def stages(self) -> list[KVShareGPT]:
        return [model.module for model in self.models]

    def run(self, batches: Iterator[Batch], count: int, how: Pass) -> Sums:
        sums: list[Sums] = []
        while len(sums) < count:  # one order for each global batch, evaluations have many
            sums += self._run_some(batches, min(self.num_microbatches, count - len(sums)), how)
        of_all = Sums.stack(sums)
        if not how.forward_only:
            finalize_gradients(self.models, of_all.num_tokens.sum().int())
        return of_all

    def _run_some(self, batches: Iterator[Batch], count: int, how: Pass) -> list[Sums]:
        """Gradients are added to the weights' buffers; nothing is reduced over ranks."""
        messages = self.message_plan(how.plan, count, how.forward_only)
        tasks = messages.graph.tasks
        shapes = {key: self._shapes(task, key) for task in tasks for key in task.makes}
        executor = StageExecutor(
            messages,
            {stage.stage.number: stage for stage in self.stages},
            Transport(messages, self.state.pp_group, self._buffer(messages, shapes)),
            shapes,
            self.stages[0].heads,
            how.measure_residual,
        )
        taken: list[Microbatch] = []
        losses: dict[int, torch.Tensor] = {}
        sums = [self._nothing(how) for _ in range(count)]
        for action in messages.order[self.state.pp_rank]:
            number = action.microbatch
            while len(taken) <= number:
                taken.append(self._microbatch(next(batches)))
            if not action.forward:
                executor.backward(action, losses.pop(number, None))
                continue
            output = executor.forward(action, taken[number])
            if output.losses is not None:
                losses[number] = output.losses.total
                counted = taken[number].counted
                of_loss = Sums.of(output.losses.each, counted, None)
                sums[number] = of_loss._replace(residuals=sums[number].residuals)
            _add_residuals(sums[number].residuals, how.plan, tasks[action.task], output)
        executor.transport.finish()
        return sums

    def _nothing(self, how: Pass) -> Sums:
        device = self.state.platform.device
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        rows = plan_residuals(how.plan, device) if how.measure_residual else None
        return Sums(nothing, nothing, rows)

    def _microbatch(self, batch: Batch) -> Microbatch:
        contexts = self.stages[0].contexts(batch.tokens, batch.position_ids, batch.document_ids)
        return Microbatch(batch.tokens, batch.labels, counted_tokens(batch), contexts)

    def _shapes(self, task: Task, key: Key) -> Shapes:
        """Of the tensors of a value on its way from this rank."""
        heads, sequences = self.stages[0].heads, self.payload.sequences
        tokens = tokens_of(task, key, self.payload)
        if key.is_kv:
            width = heads.local_kv_width
            one = (width,) if heads.kv_heads_are_split else (heads.local_kv_heads, heads.head_dim)
            return ((tokens, sequences, *one),) * 2
        return ((tokens, sequences, self.payload.hidden_size),)

    def _buffer(
        self, messages: MessagePlan, shapes: Mapping[Key, Shapes]
    ) -> Callable[[Message], torch.Tensor]:
        dtype, device = self.stages[0].config.params_dtype, self.state.platform.device

        def buffer(message: Message) -> torch.Tensor:
            parts = (shape for key in messages.keys(message) for shape in shapes[key])
            elements = sum(torch.Size(shape).numel() for shape in parts)
            return torch.empty(elements, dtype=dtype, device=device)

        return buffer


def _add_residuals(
    rows: torch.Tensor | None, plan: ExecutionPlan, task: Task, output: TaskOutput
) -> None:
    if rows is None or output.residuals is None:
        return
    if isinstance(task, LayersTask):
        rows[plan.groups.index(task.segment), : len(output.residuals)] = output.residuals
    elif isinstance(task, SweepTask):
        rows[plan.groups.index(task.segment), task.number] += output.residuals
