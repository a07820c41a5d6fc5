"""What every engine does for the training loop, which knows no other name of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from megatron_kvshare.checkpoint.load import Found
from megatron_kvshare.checkpoint.save import Content
from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.pipeline.runner import Pass, Sums


class Engine(Protocol):
    """Owns the gradients and the optimizer of the pipeline stages of this rank.

    All ranks call the same methods in the same order. Of a training step: ``forward_backward``,
    ``gradient_norm``, and ``update`` unless the step is to change nothing.
    """

    @property
    def stages(self) -> Sequence[KVShareGPT]:
        """Of this rank, with the weights that train."""
        ...

    def forward_backward(self, batches: Iterator[Batch], how: Pass) -> Sums:
        """One global batch, from cleared gradients; sums ``[microbatches]`` over all ranks that
        see other tokens or other stages. Afterwards the engine's gradient, what
        :meth:`gradient_norm` and :meth:`update` are about, is that of the mean loss per token of
        the global batch."""
        ...

    def evaluate(self, batches: Iterator[Batch], how: Pass, global_batches: int) -> Sums:
        """The same sums without gradient; to be called inside :meth:`evaluating`."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Around evaluations, one or several."""
        ...

    def whole_weights(self) -> AbstractContextManager[None]:
        """``stages`` hold their whole weights inside."""
        ...

    def set_learning_rate(self, step: int) -> float:
        """Set and return that of ``step``, from 1."""
        ...

    def gradient_norm(self) -> float:
        """L2 norm over all parameters and ranks, before clipping."""
        ...

    def update(self, grad_norm: float) -> None:
        """Clip by the ``grad_norm`` that :meth:`gradient_norm` returned and take the step."""
        ...

    def state_shards(self, with_optimizer: bool) -> AbstractContextManager[Content]:
        """Inside, what this rank has for a checkpoint, to be written or copied there."""
        ...

    def load(self, found: Found) -> None:
        """Fill weights and optimizer from a checkpoint.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        ...
