"""All settings of a pretraining run: frozen groups, flat on the command line and in YAML."""

from __future__ import annotations

from dataclasses import field

from megatron_kvshare.config.fields.data import DataConfig
from megatron_kvshare.config.fields.model import ModelConfig, ParallelConfig, SharingConfig
from megatron_kvshare.config.fields.training import (
    CheckpointConfig,
    DeepSpeedConfig,
    LogConfig,
    TrainConfig,
)
from megatron_kvshare.config.fields.types import SCHEMA, dataclass


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class PretrainConfig:
    """Run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    dry_run: bool = False
    """Print configuration, data plan, parameters and memory, start no process group, then stop."""
