"""Engines: what trains the stages of a rank, behind one protocol; here, which one trains a run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_kvshare.engines.deepspeed import DeepSpeedEngine
from megatron_kvshare.engines.engine import Engine
from megatron_kvshare.engines.megatron import MegatronEngine
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.spec.run_plan import RunPlan


def build_engine(planned: RunPlan, stages: Sequence[KVShareGPT], state: ParallelState) -> Engine:
    """``stages``: of this rank, with their first weights.

    Raises:
        ConfigError: DeepSpeed is to train and is not installed.
    """
    if planned.deepspeed is not None:
        return DeepSpeedEngine(planned, stages, state)
    return MegatronEngine(planned, stages, state)
