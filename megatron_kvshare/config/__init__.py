"""Settings of every command: dataclasses, flags and YAML keys made from them, rules."""

from __future__ import annotations

from megatron_kvshare.config.cli import Command, parse
from megatron_kvshare.config.data import DataConfig
from megatron_kvshare.config.model import ModelConfig, ParallelConfig, SharingConfig
from megatron_kvshare.config.schema import PretrainConfig
from megatron_kvshare.config.training import CheckpointConfig, LogConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "Command",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "ParallelConfig",
    "PretrainConfig",
    "SharingConfig",
    "TrainConfig",
    "parse",
]
