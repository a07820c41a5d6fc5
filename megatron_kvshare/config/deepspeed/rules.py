"""Rules of the flags of DeepSpeed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Protocol

from megatron_kvshare.config.derive import SIZE_FLAG, step_of_tag
from megatron_kvshare.config.fields.model import ParallelConfig
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.config.fields.training import DeepSpeedConfig
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.errors import Fault

_DETAILS = (
    "deepspeed_config",
    "zero_stage",
    "zero_offload",
    "load_tag",
    "universal_checkpoint",
    "deepspeed_activation_checkpointing",
)


class HasEngine(Protocol):
    """A configuration with an engine and a parallel layout."""

    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def deepspeed(self) -> DeepSpeedConfig: ...


@rule(f"engine deepspeed {' '.join(_DETAILS)}")
def engine_is_asked_for(config: HasEngine) -> Iterator[Fault]:
    """What only DeepSpeed does needs DeepSpeed."""
    settings = config.deepspeed
    if settings.is_engine:
        return
    for name in _DETAILS:
        value = getattr(settings, name)
        if value is not None and value is not False:
            fix = f"add --deepspeed, or drop {flag_of(name)}"
            yield Fault(flag_of(name), value, "it has a meaning with --engine deepspeed only", fix)


@rule("engine deepspeed")
def deepspeed_is_there(config: PretrainConfig) -> Iterator[Fault]:
    """DeepSpeed is optional."""
    if config.deepspeed.is_engine and importlib.util.find_spec("deepspeed") is None:
        rule_text = "the package deepspeed is not installed"
        fix = "DS_BUILD_OPS=0 pip install deepspeed, or use --engine megatron"
        yield Fault("--engine", "deepspeed", rule_text, fix)


@rule("engine deepspeed pipeline_model_parallel_size")
def stages_are_not_pipelined(config: HasEngine) -> Iterator[Fault]:
    """ZeRO spreads what pipeline stages would."""
    ranks = config.parallel.pipeline_model_parallel_size
    if config.deepspeed.is_engine and ranks > 1:
        rule_text = "DeepSpeed's ZeRO 2 and 3 do not combine with pipeline stages"
        fix = "use --tensor-model-parallel-size or a higher --zero-stage, or --engine megatron"
        yield Fault(SIZE_FLAG, ranks, rule_text, fix)


@rule("engine deepspeed use_distributed_optimizer overlap_grad_reduce overlap_param_gather")
def shards_by_zero(config: HasEngine) -> Iterator[Fault]:
    """Megatron-core's data parallelism is not used."""
    instead = {
        "use_distributed_optimizer": "use --zero-stage 1",
        "overlap_grad_reduce": 'write "overlap_comm": true in the zero_optimization of the JSON',
        "overlap_param_gather": "use --zero-stage 3, which gathers weights ahead of their use",
    }
    for name, fix in instead.items():
        if config.deepspeed.is_engine and getattr(config.parallel, name):
            rule_text = "it is of megatron-core's data parallelism, and DeepSpeed's is asked for"
            yield Fault(flag_of(name), True, rule_text, fix)


@rule("engine deepspeed load ckpt_step load_tag universal_checkpoint")
def loading_is_named(config: PretrainConfig) -> Iterator[Fault]:
    """A tag names one folder of the checkpoint that is loaded."""
    settings = config.deepspeed
    if not settings.is_engine:
        return
    step = step_of_tag(settings.load_tag)
    if settings.load_tag is not None and step is None:
        rule_text = "the folders of checkpoints inside --load are called global_step<N> or iter_<N>"
        yield Fault("--load-tag", settings.load_tag, rule_text, "use for example global_step1000")
    if None not in (step, config.checkpoint.ckpt_step) and step != config.checkpoint.ckpt_step:
        rule_text = f"--ckpt-step names another, {config.checkpoint.ckpt_step}"
        yield Fault("--load-tag", settings.load_tag, rule_text, "leave one of them out")
    if settings.load_tag is not None and config.checkpoint.load is None:
        rule_text = "it says which checkpoint of --load is loaded"
        yield Fault("--load-tag", settings.load_tag, rule_text, "add --load FOLDER, or drop it")
    if settings.universal_checkpoint:
        rule_text = "shards are loaded on any number of ranks, stage and engine without conversion"
        fix = "leave it out, and give --load the folder that ds_to_universal has converted"
        yield Fault("--universal-checkpoint", True, rule_text, fix)


ENGINE_RULES = (engine_is_asked_for, stages_are_not_pipelined, shards_by_zero)
"""Of the engine itself, wherever it is planned for."""
DEEPSPEED_RULES = (*ENGINE_RULES, deepspeed_is_there, loading_is_named)
