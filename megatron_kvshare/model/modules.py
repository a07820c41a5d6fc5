"""The parts of a layer besides attention, and the implementation of each that
``--transformer-impl`` chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.kernels.gated_silu import gated_silu
from megatron_kvshare.kernels.norm import add_rms_norm, rms_norm
from megatron_kvshare.megatron_api import layers, transformer_engine
from megatron_kvshare.megatron_api.layers import TransformerConfig


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in fp32.

    Under sequence parallelism each rank sees part of the sequence: the weight carries
    megatron-core's ``sequence_parallel`` mark, by which its gradient is summed over the
    tensor-parallel ranks.
    """

    def __init__(
        self,
        size: int,
        epsilon: float,
        dtype: torch.dtype,
        sequence_parallel: bool,
        compile_wanted: bool,
    ) -> None:
        super().__init__()
        self.compile_wanted = compile_wanted
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, x: torch.Tensor, more: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x``; with ``more``: ``x + more``, and its norm."""
        if more is None:
            return rms_norm(x, self.weight, self.epsilon, self.compile_wanted)
        return add_rms_norm(x, more, self.weight, self.epsilon, self.compile_wanted)


def add_and_norm(
    norm: nn.Module, x: torch.Tensor, more: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + more``, and what ``norm``, of either implementation, makes of it."""
    if isinstance(norm, RMSNorm):
        both: tuple[torch.Tensor, torch.Tensor] = norm(x, more)
        return both
    total = x + more
    return total, norm(total)


@dataclass(frozen=True)
class LayerSpec:
    """Constructors: ``column`` and ``row`` take (input, output, config), ``norm`` as
    :class:`RMSNorm` but for ``compile_wanted``: whether to compile what is between them."""

    column: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    compile_wanted: bool


def layer_spec(model: ModelConfig) -> LayerSpec:
    compile_wanted = model.compile
    if model.transformer_impl == "local":
        norm = partial(RMSNorm, compile_wanted=compile_wanted)
        return LayerSpec(layers.ColumnParallel, layers.RowParallel, norm, compile_wanted)
    if not transformer_engine.is_available():
        raise ConfigError(
            Fault(
                "--transformer-impl",
                model.transformer_impl,
                "Transformer Engine cannot be imported here",
                "install transformer-engine[pytorch] on a GPU machine, or use local layers",
            )
        )
    parts = transformer_engine.load_layers()
    return LayerSpec(parts.column, parts.row, parts.norm, compile_wanted)


def build_norm(model: ModelConfig, config: TransformerConfig) -> nn.Module:
    """The norm over hidden states, as every layer has two and the last stage a final one."""
    return layer_spec(model).norm(
        config.hidden_size, model.norm_epsilon, config.params_dtype, config.sequence_parallel
    )


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``; ``linear_fc1`` holds this rank's rows ``[gate | up]``."""

    def __init__(self, spec: LayerSpec, config: TransformerConfig) -> None:
        super().__init__()
        self.compile_wanted = spec.compile_wanted
        self.linear_fc1 = spec.column(config.hidden_size, 2 * config.ffn_hidden_size, config)
        self.linear_fc2 = spec.row(config.ffn_hidden_size, config.hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(gated_silu(self.linear_fc1(x), self.compile_wanted))
