"""Messages between the tasks of different ranks (L4): which, in which order, and their transport.

The order of every rank's actions is known to all, so each receiver knows what comes next from
whom: messages carry no names, and no shapes are exchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_kvshare.sharing.order import Action, TaskGraph
from megatron_kvshare.sharing.tasks import Key


class Message(NamedTuple):
    """What task ``maker`` made of a microbatch on its way to ``rank``; or, ``forward`` False, the
    gradients of it on their way back from ``rank``."""

    forward: bool
    maker: int
    microbatch: int
    rank: int


class Edge(NamedTuple):
    """What a task made for another rank: the ``keys`` read there, those whose ``gradients`` come
    back, and the reader whose backward is the last there (the first in forward order)."""

    keys: tuple[Key, ...]
    gradients: tuple[Key, ...]
    last_reader: int | None


@dataclass(frozen=True)
class MessagePlan:
    """The messages of a schedule. ``order[rank]``: the actions of each rank."""

    graph: TaskGraph
    order: Sequence[Sequence[Action]]
    forward_only: bool

    @cached_property
    def edges(self) -> dict[int, dict[int, Edge]]:
        """Task -> other rank that reads what it makes -> what goes there."""
        return {
            maker: {rank: self._edge(maker, rank) for rank in self._other_readers(maker)}
            for maker in range(len(self.graph.tasks))
        }

    def _other_readers(self, maker: int) -> list[int]:
        ranks = {self.graph.rank(reader) for reader in self.graph.readers[maker]}
        return sorted(ranks - {self.graph.rank(maker)})

    def _edge(self, maker: int, rank: int) -> Edge:
        graph, made = self.graph, self.graph.tasks[maker]
        readers = [reader for reader in graph.readers[maker] if graph.rank(reader) == rank]
        keys = tuple(k for k in made.makes if any(k in graph.tasks[r].reads for r in readers))
        learning = [r for r in readers if graph.tasks[r].gradient]
        if self.forward_only or not made.gradient or not learning:
            return Edge(keys, (), None)
        gradients = (k for k in keys if any(k in graph.tasks[r].reads for r in learning))
        return Edge(keys, tuple(gradients), min(learning))

    def sent_after(self, action: Action) -> list[Message]:
        """What leaves when ``action`` is done, in order."""
        forward, task, microbatch = action
        if forward:
            return [Message(True, task, microbatch, rank) for rank in self.edges[task]]
        here = self.graph.rank(task)
        return [
            Message(False, maker, microbatch, here)
            for maker in self.graph.needs[task]
            if here in self.edges[maker] and self.edges[maker][here].last_reader == task
        ]

    def needed_by(self, action: Action) -> list[Message]:
        """What must have arrived before ``action``."""
        forward, task, microbatch = action
        here = self.graph.rank(task)
        if forward:
            makers = (maker for maker in self.graph.needs[task] if here in self.edges[maker])
            return [Message(True, maker, microbatch, here) for maker in makers]
        edges = self.edges[task].items()
        return [Message(False, task, microbatch, rank) for rank, edge in edges if edge.gradients]

    def keys(self, message: Message) -> tuple[Key, ...]:
        """The values, or values whose gradients, a message holds, one after another."""
        edge = self.edges[message.maker][message.rank]
        return edge.keys if message.forward else edge.gradients

    def between(self, source: int, target: int) -> list[Message]:
        """Everything that goes from one rank to another, in the order in which it is sent."""
        sent = (message for action in self.order[source] for message in self.sent_after(action))
        return [message for message in sent if self.target(message) == target]

    def target(self, message: Message) -> int:
        return message.rank if message.forward else self.graph.rank(message.maker)


class Transport:
    """Sends and receives flat tensors in the order of a plan, among the ranks of a pipeline."""

    def __init__(
        self,
        plan: MessagePlan,
        group: dist.ProcessGroup,
        buffer: Callable[[Message], torch.Tensor],
    ) -> None:
        self.plan = plan
        self.rank = dist.get_rank(group)
        self.global_ranks = dist.get_process_group_ranks(group)
        self.group = group
        self.sending: list[tuple[dist.Work, torch.Tensor]] = []
        others = (rank for rank in range(len(self.global_ranks)) if rank != self.rank)
        self.inboxes = {
            rank: _Inbox(plan.between(rank, self.rank), self._receiver(rank, buffer))
            for rank in others
        }
        self.source = {m: rank for rank, box in self.inboxes.items() for m in box.order}
        self.bytes_sent = 0

    def _channel(self, source: int, target: int) -> dist.ProcessGroup | None:
        """Up and down by different groups: a pair's messages in one NCCL communicator would wait
        for one another."""
        return self.group if source < target else dist.group.WORLD

    def _receiver(
        self, source: int, buffer: Callable[[Message], torch.Tensor]
    ) -> Callable[[Message], tuple[dist.Work, torch.Tensor]]:
        def receive(message: Message) -> tuple[dist.Work, torch.Tensor]:
            into = buffer(message)
            channel = self._channel(source, self.rank)
            work = dist.irecv(into, self.global_ranks[source], group=channel)
            assert work is not None
            return work, into

        return receive

    def send(self, message: Message, flat: torch.Tensor) -> None:
        """Start sending; :meth:`finish` waits for it."""
        target = self.plan.target(message)
        channel = self._channel(self.rank, target)
        work = dist.isend(flat, self.global_ranks[target], group=channel)
        assert work is not None
        self.bytes_sent += flat.numel() * flat.element_size()
        self.sending = [(w, t) for w, t in self.sending if not w.is_completed()]
        self.sending.append((work, flat))

    def take(self, message: Message) -> torch.Tensor:
        """Wait for a message."""
        return self.inboxes[self.source[message]].take(message)

    def finish(self) -> None:
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()


class _Inbox:
    """Messages from one rank; the next two are always being received."""

    AHEAD = 2

    def __init__(
        self,
        order: list[Message],
        receive: Callable[[Message], tuple[dist.Work, torch.Tensor]],
    ) -> None:
        self.order = order
        self.coming = deque(order)
        self.receive = receive
        self.posted: deque[tuple[Message, dist.Work, torch.Tensor]] = deque()
        self.arrived: dict[Message, torch.Tensor] = {}

    def _post(self) -> None:
        while self.coming and len(self.posted) < self.AHEAD:
            message = self.coming.popleft()
            self.posted.append((message, *self.receive(message)))

    def take(self, wanted: Message) -> torch.Tensor:
        while wanted not in self.arrived:
            self._post()
            message, work, into = self.posted.popleft()
            work.wait()
            self.arrived[message] = into
        self._post()
        return self.arrived.pop(wanted)
