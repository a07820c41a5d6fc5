"""Optional Transformer Engine layers, imported only when asked for."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kvshare.megatron_api.linear import ALL_ROWS


class TransformerEngineLayers(NamedTuple):
    column: Any
    row: Any
    norm: Any


def is_available() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def load_layers() -> TransformerEngineLayers:
    """Classes with the constructors and outputs of :mod:`megatron_kvshare.megatron_api.layers`."""
    from megatron.core.extensions import transformer_engine as te

    common: dict[str, Any] = {"bias": False, "skip_bias_add": False, "is_expert": False}

    class Column(te.TEColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
            super().__init__(
                input_size,
                output_size,
                config=config,
                init_method=lambda weight: weight,
                gather_output=False,
                **common,
            )

        def forward(self, x: torch.Tensor, rows: slice = ALL_ROWS) -> torch.Tensor:
            return super().forward(x)[0][..., rows]

    class Row(te.TERowParallelLinear):
        def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
            super().__init__(
                input_size,
                output_size,
                config=config,
                init_method=lambda weight: weight,
                input_is_parallel=True,
                **common,
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]

    def norm(size: int, epsilon: float, dtype: torch.dtype, sequence_parallel: bool) -> Any:
        import transformer_engine.pytorch as te_pytorch

        return te_pytorch.RMSNorm(
            size, eps=epsilon, params_dtype=dtype, sequence_parallel=sequence_parallel
        )

    return TransformerEngineLayers(Column, Row, norm)
