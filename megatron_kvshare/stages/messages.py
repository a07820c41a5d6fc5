"""Messages between the tasks of different ranks: which, in which order (no torch).

The order of every rank's actions is known to all, so each receiver knows what comes next from
whom: messages carry no names, and no shapes are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_kvshare.stages.order import Action, TaskGraph
from megatron_kvshare.stages.tasks import Key


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

    @cached_property
    def _routes(self) -> dict[tuple[int, int], list[Message]]:
        routes: dict[tuple[int, int], list[Message]] = {}
        for source, actions in enumerate(self.order):
            for message in (each for action in actions for each in self.sent_after(action)):
                routes.setdefault((source, self.target(message)), []).append(message)
        return routes

    def between(self, source: int, target: int) -> list[Message]:
        """Everything that goes from one rank to another, in the order in which it is sent."""
        return self._routes.get((source, target), [])

    def source(self, message: Message) -> int:
        return self.graph.rank(message.maker) if message.forward else message.rank

    def target(self, message: Message) -> int:
        return message.rank if message.forward else self.graph.rank(message.maker)
