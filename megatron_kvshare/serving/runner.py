"""Steps on one rank, or on all of a tensor-parallel model: rank 0 decides, the others follow."""

from __future__ import annotations

import torch.distributed as dist

from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.serving.layout import CacheLayout
from megatron_kvshare.serving.step import Step
from megatron_kvshare.serving.worker import StepResult, Worker


class WorkerRunner:
    """See :class:`megatron_kvshare.serving.engine.Runner`."""

    def __init__(self, worker: Worker, state: ParallelState) -> None:
        self.worker = worker
        self.state = state

    @property
    def layout(self) -> CacheLayout:
        return self.worker.cache.layout

    @property
    def pages(self) -> tuple[int, ...]:
        return self.worker.cache.pages

    @property
    def cache_bytes(self) -> int:
        return self.worker.cache.nbytes

    def run(self, step: Step) -> StepResult:
        self._tell(step)
        return self.worker.run(step)

    def close(self) -> None:
        self._tell(None)

    def follow(self) -> None:
        """On the other ranks: carry out what rank 0 says until it closes."""
        while (step := self._hear()) is not None:
            self.worker.run(step)

    def _tell(self, step: Step | None) -> None:
        if self.state.tp_size > 1:
            dist.broadcast_object_list([step], src=0, group=self.state.tp_group)

    def _hear(self) -> Step | None:
        said: list[Step | None] = [None]
        dist.broadcast_object_list(said, src=0, group=self.state.tp_group)
        return said[0]
