"""Forward and backward of one global batch through megatron-core's schedules."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_kvshare.megatron_api.platform import cpu_mode

Shape = tuple[int, int, int]
"""Of a payload: ``[rows, b, width]``."""


class ChunkOutput(NamedTuple):
    """``tensor``: what a stage sends, or the sum of the token losses on the last one, which divides
    it by its ``num_tokens`` (int, 0 on the others); ``sums``: anything to hand back."""

    tensor: torch.Tensor
    num_tokens: torch.Tensor
    sums: Any


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Iterator[Any],
    *how: Any,
    num_microbatches: int,
    cuts: Sequence[tuple[Shape | None, Shape | None]] = (),
    forward_only: bool = False,
) -> list[list[Any]]:
    """Run ``num_microbatches`` of ``batches`` through the ``chunks`` (stages) of this rank, each by
    ``chunk(batch, *how)``, which returns a :class:`ChunkOutput`; their ``sums`` come back, of every
    chunk those of its microbatches in order.

    The ``module`` of a chunk is its data-parallel wrapper; ``cuts``: shapes of the payloads that
    each chunk receives and sends, None at the ends of the model. One stage runs alone, stages of
    several ranks by the 1F1B schedule, several stages on each rank by the interleaved one.

    Unless ``forward_only``, the gradient buffers of the wrappers then hold the gradient of the mean
    loss per unmasked token of the **global** batch: sums of losses and numbers of tokens are added
    over microbatches and data-parallel ranks before dividing, so their split does not matter.
    """
    models = [chunk.module for chunk in chunks]
    sums: dict[torch.nn.Module, list[Any]] = {chunk: [] for chunk in chunks}

    def finalize(_: Any, *arguments: Any, **named: Any) -> None:
        finalize_model_grads(models, *arguments, **named)

    config = _config_of(chunks[0])
    config.finalize_model_grads_func = finalize
    config.microbatch_group_size_per_vp_stage = microbatch_group(
        num_microbatches, config.pipeline_model_parallel_size
    )
    with contextlib.ExitStack() as naming_cuda:
        naming_cuda.enter_context(cpu_mode())

        def forward_step(batches: Iterator[Any], chunk: torch.nn.Module) -> Any:
            # The schedules name "cuda" before the first microbatch only: leave the costly mode.
            naming_cuda.close()
            output: ChunkOutput = chunk(next(batches), *how)
            sums[chunk].append(output.sums)
            return output.tensor, lambda tensor: (tensor, output.num_tokens, None)

        copies = itertools.tee(itertools.islice(batches, num_microbatches), len(chunks))
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=list(copies),
            model=list(chunks),
            num_microbatches=num_microbatches,
            forward_only=forward_only,
            **_payload_sizes(config, cuts),
        )
    return list(sums.values())


def _payload_sizes(
    config: Any, cuts: Sequence[tuple[Shape | None, Shape | None]]
) -> dict[str, Any]:
    """Payload shapes as the schedules take them: 1F1B for each cut, interleaved one for all."""
    shapes = {shape for cut in cuts for shape in cut if shape is not None}
    sizes: dict[str, Any] = {"seq_length": 1, "micro_batch_size": 1}
    if len(cuts) == 1 and shapes:
        either = next(iter(shapes))
        sizes["adjust_tensor_shapes_fn"] = lambda *_: [[shape or either] for shape in cuts[0]]
    elif shapes:
        ((rows, batch, config.hidden_size),) = shapes
        config.sequence_parallel = False  # or the schedule would divide the rows once more
        sizes.update(seq_length=rows, micro_batch_size=batch)
    return sizes


def finalize_gradients(models: Sequence[torch.nn.Module], num_tokens: torch.Tensor) -> None:
    """After backward without a schedule: the same reductions over ranks, and the division by the
    tokens of the global batch. ``num_tokens`` (int): this rank's, of the last pipeline stage."""
    with cpu_mode():
        finalize_model_grads(list(models), num_tokens)


def microbatch_group(num_microbatches: int, ranks: int) -> int:
    """How many microbatches the interleaved schedule sends round together: the fewest it allows,
    at least one per rank, with no smaller group left over."""
    sizes = range(ranks, num_microbatches + 1)
    fits = (size for size in sizes if not 0 < num_microbatches % size < ranks)
    return next(fits, ranks)


def _config_of(model: torch.nn.Module) -> Any:
    return model.config
