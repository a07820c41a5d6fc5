"""Forward and backward of one global batch through megatron-core's schedule (L2)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_kvshare.megatron_api.platform import cpu_mode

MicrobatchLoss = Callable[[Any, torch.nn.Module], tuple[torch.Tensor, torch.Tensor, Any]]
"""``(batch, model) -> (sum of token losses, number of tokens (int), anything to return)``."""


def run_schedule(
    model: torch.nn.Module,
    batches: Iterator[Any],
    microbatch_loss: MicrobatchLoss,
    num_microbatches: int,
    forward_only: bool = False,
) -> list[Any]:
    """Run ``num_microbatches`` of ``batches``; returns the third of each ``microbatch_loss``.

    Unless ``forward_only``, the gradient buffer of the data-parallel wrapper ``model`` then holds
    the gradient of the mean loss per unmasked token of the **global** batch: sums of losses and
    numbers of tokens are added over microbatches and data-parallel ranks before dividing, so their
    split does not matter.
    """
    model.config.finalize_model_grads_func = finalize_model_grads
    with contextlib.ExitStack() as naming_cuda:
        naming_cuda.enter_context(cpu_mode())

        def forward_step(batches: Iterator[Any], model: torch.nn.Module) -> Any:
            # The schedule names "cuda" before its first microbatch only: leave the costly mode.
            naming_cuda.close()
            loss_sum, num_tokens, result = microbatch_loss(next(batches), model)
            return loss_sum, lambda output: (output, num_tokens, result)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=num_microbatches,
            seq_length=0,  # the schedule without pipeline stages exchanges no tensors
            micro_batch_size=0,
            forward_only=forward_only,
        )
