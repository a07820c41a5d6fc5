"""Runs the tasks of a schedule on one rank, forward and backward.

Every value is cut out of its task's graph: readers get a leaf, backward of a reader leaves its
gradient there, and when all readers are through, the maker's backward starts from the sum. Across
ranks the leaf is a received copy, and its gradient goes back as a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_kvshare.model.attention import whole_head
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.pipeline.payload import own_part, spread_part
from megatron_kvshare.pipeline.stage_tasks import Microbatch, TaskOutput, Tensors, run_task
from megatron_kvshare.pipeline.transport import Transport
from megatron_kvshare.stages.messages import Message, MessagePlan
from megatron_kvshare.stages.order import Action
from megatron_kvshare.stages.tasks import Key, Task

Shapes = Sequence[tuple[int, ...]]
"""Of the tensors of one value."""
Place = tuple[int, Key]
"""Microbatch and value."""


@dataclass
class _Value:
    """``leaf``: what readers use, or the ``part`` of a shared KV head that they put together;
    ``readers``: forward tasks here that have yet to read it."""

    leaf: Tensors
    part: bool
    readers: int
    keeps_gradient: bool


@dataclass
class StageExecutor:
    """``models``: this rank's stages by number. One executor runs one global batch."""

    plan: MessagePlan
    models: Mapping[int, KVShareGPT]
    transport: Transport
    shapes: Mapping[Key, Shapes]
    heads: HeadLayout
    measure: bool = False
    values: dict[Place, _Value] = field(default_factory=dict)
    graphs: dict[Place, Tensors] = field(default_factory=dict)
    received: set[Message] = field(default_factory=set)

    @property
    def rank(self) -> int:
        return self.transport.rank

    def forward(self, action: Action, microbatch: Microbatch) -> TaskOutput:
        """Receive what the task reads, run it, and send what other ranks read."""
        task = self._task(action)
        for message in self.plan.needed_by(action):
            self._receive_values(message)
        keys = (*task.reads, *task.measures) if self.measure else task.reads
        with torch.set_grad_enabled(self._has_graph(task)):
            read = {key: self._read(action.microbatch, key) for key in keys}
            output = run_task(task, self.models[task.stage.number], microbatch, read, self.measure)
        for key, tensors in output.made.items():
            self._keep(action, key, tensors)
        for message in self.plan.sent_after(action):
            values = (self._sent(key, output.made[key]) for key in self.plan.keys(message))
            self.transport.send(message, _flat([t for value in values for t in value]))
        for key in task.reads:
            self._read_once(action.microbatch, key)
        return output

    def backward(self, action: Action, loss: torch.Tensor | None = None) -> None:
        """Collect the gradients of what the task made, run backward, send what came out of it."""
        task, microbatch = self._task(action), action.microbatch
        outputs: list[torch.Tensor] = [] if loss is None else [loss]
        gradients: list[torch.Tensor | None] = [None] * len(outputs)
        arrived = self._arrived_gradients(action)
        for key in task.makes:
            graph = self.graphs.pop((microbatch, key), ())
            own = self.values.pop((microbatch, key), None)
            for index, tensor in enumerate(graph):
                parts = [part[index] for part in arrived.get(key, ())]
                if own is not None and own.leaf[index].grad is not None:
                    parts.append(own.leaf[index].grad)
                if tensor.requires_grad and parts:
                    outputs.append(tensor)
                    gradients.append(sum(parts[1:], parts[0]))
        if outputs:
            torch.autograd.backward(outputs, gradients)
        for message in self.plan.sent_after(action):
            self._send_gradients(message)

    def _read(self, microbatch: int, key: Key) -> Tensors:
        value = self.values[microbatch, key]
        if not value.part:
            return value.leaf
        whole = whole_head(torch.cat(value.leaf, dim=-1), self.heads)
        return tuple(x.unsqueeze(2) for x in whole.chunk(2, dim=-1))

    def _is_part(self, key: Key) -> bool:
        """Ranks that share a KV head each send their part of it."""
        return key.is_kv and self.heads.kv_heads_are_split

    def _sent(self, key: Key, tensors: Tensors) -> Tensors:
        return tuple(own_part(t, self.heads) for t in tensors) if self._is_part(key) else tensors

    def _task(self, action: Action) -> Task:
        return self.plan.graph.tasks[action.task]

    def _has_graph(self, task: Task) -> bool:
        return task.gradient and not self.plan.forward_only

    def _local_readers(self, key: Key) -> list[Task]:
        graph = self.plan.graph
        readers = (graph.tasks[r] for r in graph.readers[graph.maker[key]])
        return [task for task in readers if task.stage.rank == self.rank and key in task.reads]

    def _keep(self, action: Action, key: Key, tensors: Tensors) -> None:
        place = (action.microbatch, key)
        keeps_graph = self._has_graph(self._task(action)) and key.what != "input"
        if keeps_graph:
            self.graphs[place] = tensors
        self._add_value(place, tuple(t.detach() for t in tensors), keeps_graph)

    def _add_value(
        self, place: Place, tensors: Tensors, keeps_graph: bool, part: bool = False
    ) -> None:
        readers = self._local_readers(place[1])
        keeps_gradient = keeps_graph and any(task.gradient for task in readers)
        if readers or self.measure:
            leaf = tuple(t.requires_grad_(keeps_gradient) for t in tensors)
            self.values[place] = _Value(leaf, part, len(readers), keeps_gradient)

    def _read_once(self, microbatch: int, key: Key) -> None:
        """Forget a value after its last reader, unless its gradient is still to come."""
        value = self.values[microbatch, key]
        value.readers -= 1
        if value.readers == 0 and not value.keeps_gradient and not self.measure:
            del self.values[microbatch, key]

    def _receive_values(self, message: Message) -> None:
        keys = self.plan.keys(message)
        if message in self.received:
            return  # by an earlier reader
        self.received.add(message)
        flat = self.transport.take(message)
        keeps_graph = self._has_graph(self.plan.graph.tasks[message.maker])
        for key, tensors in self._unflat(keys, flat).items():
            place, part = (message.microbatch, key), self._is_part(key)
            self._add_value(place, tensors, keeps_graph, part)

    def _arrived_gradients(self, action: Action) -> dict[Key, list[Tensors]]:
        arrived: dict[Key, list[Tensors]] = {}
        for message in self.plan.needed_by(action):
            keys = self.plan.keys(message)
            for key, tensors in self._unflat(keys, self.transport.take(message)).items():
                if self._is_part(key):
                    tensors = tuple(spread_part(part, self.heads) for part in tensors)
                arrived.setdefault(key, []).append(tensors)
        return arrived

    def _send_gradients(self, message: Message) -> None:
        gradients = []
        for key in self.plan.keys(message):
            value = self.values.pop((message.microbatch, key))
            gradients += [torch.zeros_like(t) if t.grad is None else t.grad for t in value.leaf]
        self.transport.send(message, _flat(gradients))

    def _unflat(self, keys: Sequence[Key], flat: torch.Tensor) -> dict[Key, Tensors]:
        sizes = [torch.Size(shape).numel() for key in keys for shape in self.shapes[key]]
        parts = iter(flat.split(sizes))
        return {key: tuple(next(parts).view(shape) for shape in self.shapes[key]) for key in keys}


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
