"""Everything a training run holds (L5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kvshare.checkpoint.manifest import Progress
from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.config.pretrain import BatchLayout
from megatron_kvshare.data.train_data import TrainData
from megatron_kvshare.megatron_api.optimizer import (
    MegatronOptimizer,
    Models,
    OptimizerParamScheduler,
)
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.pipeline.chunk import StageChunk
from megatron_kvshare.pipeline.spanning import SpanningPipeline
from megatron_kvshare.sharing.cost import ModelShape
from megatron_kvshare.sharing.plan import ExecutionPlan


@dataclass
class Run:
    """Built by :mod:`megatron_kvshare.train.setup`; the loop moves ``progress`` and ``saved``.

    ``models``: the pipeline stages of this rank (one, unless there are virtual stages);
    ``chunks``: the same as the schedules run them; ``spanning`` runs them instead where cyclic
    groups span stages.
    """

    config: PretrainConfig
    state: ParallelState
    layout: BatchLayout
    shape: ModelShape
    plan: ExecutionPlan
    evaluation_plan: ExecutionPlan
    data: TrainData
    models: Models
    chunks: Sequence[StageChunk]
    spanning: SpanningPipeline | None
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    progress: Progress
    saved: Path | None = None
