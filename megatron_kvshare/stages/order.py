"""In which order every pipeline rank runs its tasks (no torch).

List scheduling: whenever a rank is free it takes, of what it could run, a forward task before a
backward task, the older microbatch before the newer, and the task further on: sweeps that go round
the pipeline are long chains, and every rank should have several to choose from. The microbatches in
flight are limited, which bounds activations and lets backward come in time. Of eight such rules
this one came closest to the lower bound. All ranks compute the same order, so that each knows which
messages come and when.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_kvshare.stages.tasks import Key, Task


class Action(NamedTuple):
    """One task of one microbatch, forward or backward."""

    forward: bool
    task: int
    microbatch: int


class Timed(NamedTuple):
    """An action with the time it starts and ends, in units of the costs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class TaskGraph:
    """The tasks of a microbatch, on which ones each depends, and what they cost."""

    tasks: tuple[Task, ...]
    forward_cost: tuple[float, ...]
    backward_cost: tuple[float, ...]
    ranks: int

    @cached_property
    def maker(self) -> dict[Key, int]:
        """Value -> the task that makes it."""
        return {key: i for i, task in enumerate(self.tasks) for key in task.makes}

    @cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """Tasks whose values each task reads."""
        return tuple(tuple(sorted({self.maker[key] for key in task.reads})) for task in self.tasks)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Tasks that read what each task makes."""
        readers: list[list[int]] = [[] for _ in self.tasks]
        for reader, needed in enumerate(self.needs):
            for task in needed:
                readers[task].append(reader)
        return tuple(tuple(each) for each in readers)

    def rank(self, task: int) -> int:
        return self.tasks[task].stage.rank

    def before(self, action: Action) -> tuple[Action, ...]:
        """What must be done before ``action``: tasks it reads, or gradients it gets."""
        forward, task, microbatch = action
        if forward:
            return tuple(Action(True, need, microbatch) for need in self.needs[task])
        readers = (r for r in self.readers[task] if self.tasks[r].gradient)
        return (
            Action(True, task, microbatch),
            *(Action(False, reader, microbatch) for reader in readers),
        )

    def actions(self, microbatches: int, forward_only: bool) -> list[Action]:
        found = []
        for microbatch in range(microbatches):
            for index, task in enumerate(self.tasks):
                found.append(Action(True, index, microbatch))
                if task.gradient and not forward_only:
                    found.append(Action(False, index, microbatch))
        return found

    def cost(self, action: Action) -> float:
        return (self.forward_cost if action.forward else self.backward_cost)[action.task]


def list_schedule(
    graph: TaskGraph, microbatches: int, limit: int, forward_only: bool = False
) -> tuple[tuple[Timed, ...], ...]:
    """The actions of every rank in order, with at most ``limit`` microbatches in flight."""
    return _Simulation(graph, microbatches, limit, forward_only).run()


def makespan(schedule: Sequence[Sequence[Timed]]) -> float:
    return max(rank[-1].end for rank in schedule if rank)


def best_schedule(
    graph: TaskGraph, microbatches: int, forward_only: bool = False, tolerance: float = 0.01
) -> tuple[tuple[Timed, ...], ...]:
    """The list schedule with the fewest microbatches in flight that is about as fast as any."""
    likely = {-(-graph.ranks * halves // 2) for halves in (1, 2, 3, 4, 6)}
    limits = sorted({limit for limit in likely if limit < microbatches} | {microbatches})
    found = [list_schedule(graph, microbatches, limit, forward_only) for limit in limits]
    fastest = min(map(makespan, found))
    return next(each for each in found if makespan(each) <= (1 + tolerance) * fastest)


class _Simulation:
    """Ranks as machines; events in the order of time."""

    def __init__(self, graph: TaskGraph, microbatches: int, limit: int, forward_only: bool) -> None:
        self.graph = graph
        self.limit = limit
        actions = graph.actions(microbatches, forward_only)
        self.missing = {action: len(graph.before(action)) for action in actions}
        self.after: dict[Action, list[Action]] = {action: [] for action in actions}
        for action in actions:
            for earlier in graph.before(action):
                self.after[earlier].append(action)
        self.left = dict.fromkeys(range(microbatches), 0)
        for action in actions:
            self.left[action.microbatch] += 1
        self.waiting = list(range(microbatches))  # microbatches that have not started
        self.in_flight = 0
        self.ready: list[list[tuple[tuple[int, ...], Action]]] = [[] for _ in range(graph.ranks)]
        self.free = [True] * graph.ranks
        self.result: list[list[Timed]] = [[] for _ in range(graph.ranks)]

    def run(self) -> tuple[tuple[Timed, ...], ...]:
        self._admit()
        events: list[tuple[float, Action]] = []
        now = 0.0
        while True:
            for rank, free in enumerate(self.free):
                if free and self.ready[rank]:
                    _, action = heapq.heappop(self.ready[rank])
                    end = now + self.graph.cost(action)
                    self.result[rank].append(Timed(action, now, end))
                    heapq.heappush(events, (end, action))
                    self.free[rank] = False
            if not events:
                break
            now, action = heapq.heappop(events)
            self._finished(action)
            while events and events[0][0] == now:
                self._finished(heapq.heappop(events)[1])
        assert not any(self.left.values()), "tasks wait for one another"
        return tuple(tuple(rank) for rank in self.result)

    def _finished(self, action: Action) -> None:
        self.free[self.graph.rank(action.task)] = True
        for later in self.after[action]:
            self.missing[later] -= 1
            if self.missing[later] == 0:
                self._make_ready(later)
        self.left[action.microbatch] -= 1
        if self.left[action.microbatch] == 0:
            self.in_flight -= 1
            self._admit()

    def _make_ready(self, action: Action) -> None:
        further_on = -action.task if action.forward else action.task
        priority = (int(not action.forward), action.microbatch, further_on)
        heapq.heappush(self.ready[self.graph.rank(action.task)], (priority, action))

    def _admit(self) -> None:
        while self.waiting and self.in_flight < self.limit:
            microbatch = self.waiting.pop(0)
            self.in_flight += 1
            for index, needs in enumerate(self.graph.needs):
                if not needs:
                    self._make_ready(Action(True, index, microbatch))
