"""What a configuration comes to on a number of processes: derived once (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_kvshare.config import CheckpointConfig, PretrainConfig
from megatron_kvshare.config.data_files import DataStage, read_stages
from megatron_kvshare.config.deepspeed import told, zero_of
from megatron_kvshare.config.derive import (
    BatchLayout,
    batch_layout,
    checkpoint_settings,
    evaluation_plan,
    payload_shape,
    placement,
    recipe,
    sharing_map,
    training_layout,
    training_plan,
)
from megatron_kvshare.costs.memory import TrainingLayout, TrainingMemory, training_memory
from megatron_kvshare.costs.zero import Zero, zero_memory
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import Recipe
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.stages.placement import PayloadShape, Placement
from megatron_kvshare.stages.rank_memory import on_fullest_rank


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """``plan``: the sweeps of training; ``placement``: which stage holds which layers; ``batch``:
    how a global batch is spread over ``world_size`` processes; ``deepspeed``: what
    ``deepspeed.initialize`` is given as its configuration, None where megatron-core trains;
    ``warnings``: of what its file says, one sentence each; ``data_stages``: blends that take the
    place of the training data on the way."""

    config: PretrainConfig
    world_size: int
    recipe: Recipe
    plan: ExecutionPlan
    placement: Placement
    batch: BatchLayout
    deepspeed: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    data_stages: tuple[DataStage, ...] = ()

    @classmethod
    def of(cls, config: PretrainConfig, world_size: int) -> RunPlan:
        """``config`` has passed the rules, for so many processes too.

        Raises:
            ConfigError: DeepSpeed's JSON file says something else, or it or that of the data's
                stages cannot be read.
        """
        engine = told(config, world_size) if config.deepspeed.is_engine else None
        config = config if engine is None else engine.config
        map, how = sharing_map(config.model, config.sharing), recipe(config.sharing)
        return cls(
            config=config,
            world_size=world_size,
            recipe=how,
            plan=training_plan(map, how, config.sharing),
            placement=placement(map, config.parallel),
            batch=batch_layout(config, world_size),
            deepspeed=None if engine is None else engine.json,
            warnings=() if engine is None else engine.warnings,
            data_stages=read_stages(config.data),
        )

    @property
    def checkpoint(self) -> CheckpointConfig:
        """What to load and save."""
        return checkpoint_settings(self.config)

    @cached_property
    def evaluation_plan(self) -> ExecutionPlan:
        """The sweeps of an evaluation."""
        return evaluation_plan(self.plan.map, self.recipe, self.config.sharing)

    def spec(self, vocab_size: int, tokenizer: str | None = None) -> ModelSpec:
        """The model, once the data has told its vocabulary."""
        return ModelSpec(
            model=self.config.model,
            map=self.plan.map,
            recipe=self.recipe,
            window_size=self.config.sharing.window_size,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )

    def payload(self, spec: ModelSpec) -> PayloadShape:
        """One microbatch on its way between stages."""
        config = self.config
        return payload_shape(
            config.model, config.parallel, config.train.micro_batch_size, spec.shape
        )

    @cached_property
    def training_layout(self) -> TrainingLayout:
        """What the memory of a process depends on, besides the model."""
        config = self.config
        replicas = self.batch.data_parallel_size
        return training_layout(
            config.model, config.parallel, config.train.micro_batch_size, replicas
        )

    @cached_property
    def zero(self) -> Zero | None:
        """What of DeepSpeed's configuration costs memory; None where megatron-core trains."""
        return None if self.deepspeed is None else zero_of(self.deepspeed)

    def memory(self, spec: ModelSpec) -> TrainingMemory:
        """The estimate for the process that needs most."""
        if self.zero is not None:
            return zero_memory(spec.shape, self.plan, self.training_layout, self.zero)
        whole = training_memory(spec.shape, self.plan, self.training_layout)
        if self.placement.ranks == 1:
            return whole
        return on_fullest_rank(whole, spec.shape, self.placement)
