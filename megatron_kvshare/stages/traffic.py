"""What pipeline stages send one another, and what it costs (no torch)."""

from __future__ import annotations

from megatron_kvshare.sharing.plan import ExecutionPlan, subset_length
from megatron_kvshare.stages.messages import MessagePlan
from megatron_kvshare.stages.placement import PayloadShape, Placement, boundary_widths
from megatron_kvshare.stages.task_cost import task_graph
from megatron_kvshare.stages.tasks import Key, Task

FLOPS_PER_BYTE = 2000
"""What a device computes while it sends a byte, for the proposed layout: 400 TFLOP/s, 200 GB/s."""


def tokens_of(task: Task, key: Key, payload: PayloadShape) -> int:
    """Tokens of a value that ``task`` makes, on one rank: KV of the whole sequence, hidden states
    of the rank's part, and of both only the subset of a visit."""
    length = payload.seq_length if key.is_kv else payload.rows
    return subset_length(length, task.stride, key.offset)


def bytes_sent(plan: ExecutionPlan, placement: Placement, payload: PayloadShape) -> list[int]:
    """Bytes of values that leave every stage per microbatch, on each tensor-parallel rank, padding
    included; gradients take the same way back, for what has any."""
    if not placement.spanning_groups:
        widths = (*boundary_widths(placement, payload), 0)
        return [payload.bytes(width) for width in widths]
    graph = task_graph(payload.model, plan, placement)
    edges = MessagePlan(graph, (), forward_only=True).edges
    sent = [0] * len(placement.stages)
    for maker, ranks in edges.items():
        task = graph.tasks[maker]
        for edge in ranks.values():
            elements = sum(_elements(task, key, payload) for key in edge.keys)
            sent[task.stage.number] += elements * payload.bytes_per_element
    return sent


def _elements(task: Task, key: Key, payload: PayloadShape) -> int:
    width = 2 * payload.local_kv_width if key.is_kv else payload.hidden_size
    return tokens_of(task, key, payload) * payload.sequences * width


def cut_traffic(plan: ExecutionPlan, payload: PayloadShape) -> list[float]:
    """Bytes per token over a cut below every layer, forward and back: hidden states and the KV read
    above; inside a cyclic group in every sweep, and the KV read below too."""
    sharing, each = plan.map, payload.bytes_per_element
    hidden, kv = payload.hidden_size * each, 2 * payload.kv_width * each
    crossing = []
    for cut in range(sharing.num_layers):
        up = {s for s in sharing.sources[cut:] if s < cut}
        down = {s for s in sharing.sources[:cut] if s >= cut}
        sweeps = max((len(g.sweeps) for g in plan.groups if g.first < cut <= g.last), default=1)
        crossing.append(2.0 * sweeps * (hidden + kv * len(up | down)))
    return crossing
