"""Everything a training run holds (L5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_kvshare.checkpoint.manifest import Progress
from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.config.pretrain import BatchLayout
from megatron_kvshare.data.train_data import TrainData
from megatron_kvshare.megatron_api.optimizer import (
    DistributedDataParallel,
    MegatronOptimizer,
    OptimizerParamScheduler,
)
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.cost import ModelShape
from megatron_kvshare.sharing.plan import ExecutionPlan


@dataclass
class Run:
    """Built by :mod:`megatron_kvshare.train.setup`; the loop moves ``progress`` and ``saved``."""

    config: PretrainConfig
    state: ParallelState
    layout: BatchLayout
    shape: ModelShape
    plan: ExecutionPlan
    evaluation_plan: ExecutionPlan
    data: TrainData
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    progress: Progress
    saved: Path | None = None
