"""Where models are built (L3)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.sharing.placement import Stage
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.spec.model_spec import ModelSpec


def build_stages(
    spec: ModelSpec,
    parallel: ParallelConfig,
    plan: ExecutionPlan,
    stages: Sequence[Stage],
    state: ParallelState,
) -> list[KVShareGPT]:
    """The pipeline stages of one rank, without weights that mean anything."""
    return [KVShareGPT(spec, parallel, plan, state, stage) for stage in stages]
