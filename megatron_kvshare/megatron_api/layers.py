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
)
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import (
    linear_with_grad_accumulation_and_async_allreduce,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kvshare.megatron_api.linear import (
    ALL_ROWS,
    add_product_,
    gradient_target,
    is_for_few_rows,
    local_linear,
)

__all__ = [
    "ColumnParallel",
    "RowParallel",
    "TransformerConfig",
    "VocabEmbedding",
    "gather_last_dim",
    "scatter_to_sequence_parallel_region",
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


def _parallel_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: slice,
    group: Any,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """megatron-core's product, which overlaps messages of backward with it."""
    if is_for_few_rows(weight) and not sequence_parallel:
        return local_linear(x, weight, rows)
    part, buffer = gradient_target(weight, rows)
    if buffer is not None:
        part = part.view_as(part)  # a tensor that is no parameter: autograd gets no gradient
        part.main_grad = buffer  # type: ignore[attr-defined]
    return linear_with_grad_accumulation_and_async_allreduce(
        input=x,
        weight=part,
        bias=None,
        gradient_accumulation_fusion=buffer is not None,
        allreduce_dgrad=allreduce_dgrad,
        sequence_parallel=sequence_parallel,
        tp_group=group,
    )


class _ProductsIntoBuffer:
    """In the place of apex's extension of this name, by torch's own products."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        add_product_(main_grad, grad_output.t(), x)


megatron_layers.fused_weight_gradient_mlp_cuda = _ProductsIntoBuffer


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
        return _parallel_linear(
            x, weight, rows, self.tp_group, self.allreduce_dgrad, self.sequence_parallel
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
        part = _parallel_linear(x, self.weight, ALL_ROWS, self.tp_group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(part, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(part, group=self.tp_group)


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
