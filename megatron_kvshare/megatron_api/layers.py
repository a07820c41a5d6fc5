"""Megatron-core's parallel layers, in the shape the model uses them: no bias, one output.

Activations are ``[s, b, h]``; under sequence parallelism ``s`` is this rank's part of the sequence,
which the column-parallel layers gather and the row-parallel layers scatter again.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import (
    linear_with_grad_accumulation_and_async_allreduce,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kvshare.megatron_api.linear import ALL_ROWS, local_linear

__all__ = [
    "ColumnParallel",
    "RowParallel",
    "TransformerConfig",
    "VocabEmbedding",
    "gather_last_dim",
    "scatter_to_sequence_parallel_region",
    "vocab_parallel_cross_entropy",
]

gather_last_dim = all_gather_last_dim_from_tensor_parallel_region


def _unused_init(weight: torch.Tensor) -> torch.Tensor:
    raise AssertionError("weights are initialised by model.parameters")


def _mark_split(weight: torch.Tensor, dim: int) -> None:
    """Tell megatron-core (gradient norm, optimizer) that ranks hold different parts of ``weight``.

    megatron-core 0.16 forgets to when it does not initialise the weight itself; later versions do
    not.
    """
    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


class ColumnParallel(ColumnParallelLinear):
    """``y = x W^T`` with the rows of W split over the tensor-parallel ranks."""

    def __init__(
        self, input_size: int, output_size: int, config: TransformerConfig, own_weight: bool = True
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=_unused_init,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=not own_weight,
        )
        if own_weight:
            _mark_split(self.weight, dim=0)

    def forward(self, x: torch.Tensor, rows: slice = ALL_ROWS) -> torch.Tensor:
        """``[s, b, input] -> [s, b, local rows]``, of some local ``rows``."""
        return self.project(x, self.weight, rows)

    def project(
        self, x: torch.Tensor, weight: torch.Tensor, rows: slice = ALL_ROWS
    ) -> torch.Tensor:
        """The same with a given local ``weight`` (this layer's, or a tied one)."""
        if self.tp_group.size() == 1:
            return local_linear(x, weight, rows)
        return linear_with_grad_accumulation_and_async_allreduce(
            input=x,
            weight=weight if rows == ALL_ROWS else weight[rows],
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )


class RowParallel(RowParallelLinear):
    """``y = x W^T`` with the columns of W split over the tensor-parallel ranks; y is summed."""

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=_unused_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        _mark_split(self.weight, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[s, b, local input] -> [s, b, output]``."""
        if self.tp_group.size() == 1:
            return local_linear(x, self.weight)
        return super().forward(x)[0]


class VocabEmbedding(VocabParallelEmbedding):
    """Token embedding with the vocabulary split over the tensor-parallel ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, config: TransformerConfig) -> None:
        super().__init__(
            vocab_size,
            hidden_size,
            init_method=_unused_init,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        _mark_split(self.weight, dim=0)
        self.scattered = config.sequence_parallel

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[b, s] -> [s, b, h]`` (this rank's part of s under sequence parallelism)."""
        embedded: Any = super().forward(token_ids)
        return embedded if self.scattered else embedded.transpose(0, 1).contiguous()
