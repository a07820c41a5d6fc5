"""DeepSpeed's own files: how they are written and read here, and what its converters need to know.

DeepSpeed unpickles what it loads. Here it gets files through an object that builds tensors, plain
data and three of its classes, and refuses everything else; and a disk that is full on one rank is
an error on all, instead of ranks that wait for each other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as keys
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron_kvshare.checkpoint.deepspeed_shards import PARAMETER_GROUPS, damaged_file
from megatron_kvshare.costs.weights import Split, Weight
from megatron_kvshare.megatron_api.memory import shortage
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects
from megatron_kvshare.model.gpt import KVShareGPT

_ALLOWED = [LossScaler, fragment_address, ZeroStageEnum]


class DataFiles(CheckpointEngine):
    """What DeepSpeed saves and loads through."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def create(self, info: Any) -> None:
        self.failure = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            if shortage(error):
                raise
            self.failure = self.failure or f"{Path(path).name}: {error}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raise :class:`CheckpointError` where a file is damaged or would run code."""
        try:
            with torch.serialization.safe_globals(_ALLOWED):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a damaged pickle raises nearly anything
            if shortage(error):
                raise
            raise damaged_file(Path(path), error) from error

    def commit(self, info: Any) -> bool:
        return True

    def require_success(self, state: ParallelState) -> None:
        """Raise OSError on all ranks where one could not write."""
        failures = [each for each in gather_objects(self.failure) if each is not None]
        if failures:
            raise OSError(failures[0])


def client_state(stage: KVShareGPT) -> dict[str, Any]:
    """Our entries in the file of the model."""
    named = list(stage.named_parameters())
    groups = [[name for name, weight in named if weight.decays is each] for each in (True, False)]
    return {PARAMETER_GROUPS: groups, keys.UNIVERSAL_CHECKPOINT_INFO: universal_info(stage)}


def universal_info(stage: KVShareGPT) -> dict[str, Any]:
    """By which ``ds_to_universal`` puts the parts of tensor-parallel ranks together; from the table
    of tensors."""
    info: dict[str, Any] = {
        keys.UNIVERSAL_CHECKPOINT_VERSION_KEY: keys.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        keys.ORIGINAL_VOCAB_SIZE: stage.spec.vocab_size,
        keys.TP_REPLICATED_PARAMETER_PATTERNS: [],
        keys.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: [],
        keys.VOCABULARY_PARAMETER_PATTERNS: [],
        keys.PARAMETER_WITH_SUB_PARAMS: [],
        keys.SUB_PARAM_SHARD_WIDTHS: {},
    }
    by_split = {
        Split.WHOLE: keys.TP_REPLICATED_PARAMETER_PATTERNS,
        Split.COLUMNS: keys.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
        Split.VOCABULARY: keys.VOCABULARY_PARAMETER_PATTERNS,
    }
    ranks = stage.heads.tp_size
    for name, fused in _parameters(stage):
        pattern = f"{re.escape(name)}$"
        if len(fused) == 1 and fused[0].split in by_split:
            info[by_split[fused[0].split]].append(pattern)
        elif len(fused) > 1:
            rows = tuple(each.shape[0] for each in fused)
            shape = {"patterns": [pattern], "shape": (rows, fused[0].shape[1]), "partition_dim": 0}
            info[keys.PARAMETER_WITH_SUB_PARAMS].append(shape)
            widths = [[each // ranks] * ranks for each in rows]
            info[keys.SUB_PARAM_SHARD_WIDTHS][pattern] = widths
    return info


def _parameters(stage: KVShareGPT) -> Iterator[tuple[str, list[Weight]]]:
    """Every parameter, and the tensors that are fused in it."""
    table = stage.spec.weights_on(stage.stage)
    grouped = itertools.groupby(table, key=lambda weight: weight.parameter_on(stage.stage))
    return ((name, list(fused)) for name, fused in grouped)
