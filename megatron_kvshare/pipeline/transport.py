"""Messages of a plan on their way between the ranks of a pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_kvshare.stages.messages import Message, MessagePlan


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
        self.sending = [(w, t) for w, t in self.sending if not w.is_completed()]
        self.sending.append((work, flat))

    def take(self, message: Message) -> torch.Tensor:
        """Wait for a message."""
        return self.inboxes[self.plan.source(message)].take(message)

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
