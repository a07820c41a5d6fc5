"""How fast any order of a task graph could be: what schedules are measured against."""

from __future__ import annotations

from megatron_kvshare.stages.order import Action, TaskGraph


def lower_bound(graph: TaskGraph, microbatches: int) -> float:
    """No order can be faster: on every rank all its work, after the shortest way to its first task
    and before the shortest way from its last to the end; and the longest chain of a microbatch."""
    actions = graph.actions(1, forward_only=False)
    after: dict[Action, list[Action]] = {action: [] for action in actions}
    for action in actions:
        for earlier in graph.before(action):
            after[earlier].append(action)
    forward = [action for action in actions if action.forward]
    backward = [action for action in actions if not action.forward]
    order = [*forward, *sorted(backward, key=lambda action: -action.task)]
    head: dict[Action, float] = {}
    for action in order:
        ends = (head[earlier] + graph.cost(earlier) for earlier in graph.before(action))
        head[action] = max(ends, default=0.0)
    tail: dict[Action, float] = {}
    for action in reversed(order):
        tail[action] = max((tail[a] + graph.cost(a) for a in after[action]), default=0.0)
    longest = max(head[action] + graph.cost(action) + tail[action] for action in actions)
    for rank in range(graph.ranks):
        mine = [a for a in actions if graph.rank(a.task) == rank and graph.cost(a) > 0]
        if mine:
            work = microbatches * sum(map(graph.cost, mine))
            idle = min(head[a] for a in mine) + min(tail[a] for a in mine)
            longest = max(longest, work + idle)
    return longest
