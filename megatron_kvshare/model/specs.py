"""Which implementation each part of a layer uses: chosen by ``--transformer-impl``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api import layers, transformer_engine
from megatron_kvshare.model.norm import RMSNorm


@dataclass(frozen=True)
class LayerSpec:
    """Constructors: ``column`` and ``row`` take (input, output, config), ``norm`` as
    :class:`RMSNorm`."""

    column: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]


def layer_spec(transformer_impl: str) -> LayerSpec:
    if transformer_impl == "local":
        return LayerSpec(layers.ColumnParallel, layers.RowParallel, RMSNorm)
    if not transformer_engine.is_available():
        raise ConfigError(
            Fault(
                "--transformer-impl",
                transformer_impl,
                "Transformer Engine cannot be imported here",
                "install transformer-engine[pytorch] on a GPU machine, or use local layers",
            )
        )
    parts = transformer_engine.load_layers()
    return LayerSpec(parts.column, parts.row, parts.norm)
