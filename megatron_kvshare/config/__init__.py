"""Settings of every command: dataclasses, flags and YAML keys made from them, rules.

``flags/`` reads command lines and files and knows no setting; ``fields/`` are the settings;
``blend.py`` reads data paths with weights, ``launch.py`` what torchrun announces. None of these
four imports another. ``data_files.py`` reads the files that data flags name and ``derive.py`` is
what settings come to, ``rules/`` what they must fulfil, ``deepspeed/`` what DeepSpeed is told, and
``pretrain.py`` puts the command line of ``kvshare pretrain`` together: each of these imports those
before it, neighbours (the first two, ``rules/`` and ``deepspeed/``) not one another.
"""

from __future__ import annotations

from megatron_kvshare.config.fields.data import DataConfig
from megatron_kvshare.config.fields.model import ModelConfig, ParallelConfig, SharingConfig
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.config.fields.training import (
    CheckpointConfig,
    DeepSpeedConfig,
    LogConfig,
    TrainConfig,
)
from megatron_kvshare.config.flags.command_line import Command, parse

__all__ = [
    "CheckpointConfig",
    "Command",
    "DataConfig",
    "DeepSpeedConfig",
    "LogConfig",
    "ModelConfig",
    "ParallelConfig",
    "PretrainConfig",
    "SharingConfig",
    "TrainConfig",
    "parse",
]
