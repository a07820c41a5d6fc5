"""Everything a training run holds, and what a step is told and tells."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_kvshare.checkpoint.manifest import Progress
from megatron_kvshare.checkpoint.save import Saver
from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.data.train_data import TrainData
from megatron_kvshare.engines.engine import Engine
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.owning import Owner
from megatron_kvshare.train.watchdog import Pulse

Bad = Literal["", "nan", "spike"]
"""Why a step did not change the weights; empty: it did."""


class Orders(NamedTuple):
    """What one training step is told. ``loss_limit``: a loss above it is a spike and changes
    nothing; ``stop``: this rank's wish to stop, 0 to go on."""

    measure_residual: bool = False
    loss_limit: float = math.inf
    stop: int = 0


class StepResult(NamedTuple):
    """``loss``: mean over the unmasked tokens of the global batch, whatever its split over ranks.

    ``kv_residuals``: for every sweep how far it moved the shared keys and values,
    ``||KV_n - KV_{n-1}|| / ||KV_n||``, of the cyclic group that moved furthest; empty unless
    measured. ``skipped``: why the weights were left as they were. ``stop``: the wish of the rank
    that wants to stop, the same on all ranks.
    """

    loss: float
    lr: float
    grad_norm: float
    kv_residuals: tuple[float, ...]
    skipped: Bad
    stop: int


@dataclass
class Run:
    """Built by :mod:`megatron_kvshare.train.setup` from what was ``planned``; the loop moves
    ``progress``, ``saved`` (the newest checkpoint) and ``failed_saves`` (in a row).

    ``engine``: trains the pipeline stages of this rank. ``continued``: the checkpoint this run goes
    on from. ``tracking``: as in the manifest. ``pulse``: what this rank is doing. ``owner``: of
    what the run writes to. ``stopped_by``: what ended the loop before ``train_iters``,
    empty where nothing did.
    """

    planned: RunPlan
    spec: ModelSpec
    state: ParallelState
    data: TrainData
    engine: Engine
    progress: Progress
    owner: Owner = field(default_factory=Owner)
    saver: Saver | None = None
    saved: Path | None = None
    failed_saves: int = 0
    continued: Path | None = None
    pulse: Pulse = field(default_factory=Pulse)
    stopped_by: str = ""
    tracking: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> PretrainConfig:
        return self.planned.config

    @property
    def plan(self) -> ExecutionPlan:
        """The sweeps of training."""
        return self.planned.plan
