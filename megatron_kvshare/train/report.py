"""What a run says before it starts and after it has ended (L5), as text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.checkpoint.manifest import Health
from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.config.describe import describe
from megatron_kvshare.config.pipeline import pipeline_lines, placement
from megatron_kvshare.config.pretrain import batch_layout
from megatron_kvshare.config.shape import execution_plan, recipe
from megatron_kvshare.data.data_plan import DataPlan
from megatron_kvshare.sharing import cost, draw
from megatron_kvshare.sharing.memory import (
    TrainingLayout,
    TrainingMemory,
    on_fullest_rank,
    training_memory,
)
from megatron_kvshare.sharing.solver import recipe_name
from megatron_kvshare.sharing.weights import parameters_by_part
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.train.learning_rate import commands_to_train_on, without
from megatron_kvshare.train.metrics import perplexity
from megatron_kvshare.train.run import Run

_MIB = 2**20


class Typed(NamedTuple):
    """Words of commands: the one that starts this ``run`` again, and the ``program`` alone."""

    run: Sequence[str]
    program: Sequence[str]


def start(config: PretrainConfig, data: DataPlan, world_size: int, device: str) -> str:
    """Configuration, map, parameters, layout, memory and data plan; needs no process group."""
    return "\n".join(
        [
            "Configuration",
            *_indented(describe(config).splitlines()),
            "",
            *_model_lines(config, data.request.vocabulary.size),
            *_layout_lines(config, data.request.vocabulary.size, world_size, device),
            "Data",
            *_indented(data.lines()),
        ]
    )


def _model_lines(config: PretrainConfig, vocab_size: int) -> list[str]:
    plan = execution_plan(config.model, config.sharing)
    shape = ModelSpec.of(config.model, config.sharing, vocab_size).shape
    costs = cost.costs(shape, plan)
    parts = parameters_by_part(shape, plan.map)
    owners = len(plan.map.producers)
    lines = [
        f"map {plan.map.notation}",
        f"{owners} of {plan.map.num_layers} layers own keys and values: KV cache "
        f"{costs.kv_bytes_per_token:,} bytes per token, 1/{costs.kv_reduction:.2f} of standard",
        *([f"recipe {recipe_name(recipe(config.sharing))}"] if plan.groups else []),
        draw.sweeps_text(plan),
        f"training FLOPs {costs.train_flops_ratio:.2f} x the standard map's",
        f"parameters {costs.parameters:,}: "
        + ", ".join(
            f"{name.replace('_', ' ')} {count:,}" for name, count in parts.items() if count
        ),
    ]
    return ["Model", *_indented(lines)]


def _layout_lines(
    config: PretrainConfig, vocab_size: int, world_size: int, device: str
) -> list[str]:
    layout, parallel, train = batch_layout(config, world_size), config.parallel, config.train
    memory = memory_per_process(config, vocab_size, world_size)
    tokens = layout.global_batch_size * config.model.seq_length
    tensor = f"tensor parallel {parallel.tensor_model_parallel_size}"
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1:
        tensor += " with sequence parallel"
    if parallel.pipeline_model_parallel_size > 1:
        tensor += f" x pipeline parallel {parallel.pipeline_model_parallel_size}"
    lines = [
        f"{world_size} process{'es' * (world_size > 1)} ({device}): {tensor} x data parallel "
        f"{layout.data_parallel_size}",
        f"global batch {layout.global_batch_size} sequences ({tokens:,} tokens) = micro batch "
        f"{train.micro_batch_size} x {layout.num_microbatches} microbatches x data parallel "
        f"{layout.data_parallel_size}",
        f"{train.train_iters:,} steps, {train.train_iters * tokens:,} tokens",
        f"memory per process, estimated: {by_part(memory)}",
    ]
    if config.checkpoint.async_save:
        copy = mib(memory.weights + memory.optimizer)
        lines.append(f"--async-save: a copy of up to {copy} per process in host memory")
    return ["Layout", *_indented(lines), *_indented(_stage_lines(config, vocab_size))]


def _stage_lines(config: PretrainConfig, vocab_size: int) -> list[str]:
    shape = ModelSpec.of(config.model, config.sharing, vocab_size).shape
    micro = config.train.micro_batch_size
    return pipeline_lines(config.model, config.sharing, config.parallel, micro, shape)


def memory_per_process(config: PretrainConfig, vocab_size: int, world_size: int) -> TrainingMemory:
    """The estimate for the process that needs most."""
    parallel = config.parallel
    layout = TrainingLayout(
        micro_batch_size=config.train.micro_batch_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        data_parallel_size=batch_layout(config, world_size).data_parallel_size,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        sequence_parallel=parallel.sequence_parallel,
        bf16=config.model.bf16,
        recompute_full=config.model.recompute_granularity == "full",
    )
    shape = ModelSpec.of(config.model, config.sharing, vocab_size).shape
    whole = training_memory(shape, execution_plan(config.model, config.sharing), layout)
    if parallel.pipeline_model_parallel_size == 1:
        return whole
    return on_fullest_rank(whole, shape, placement(config.model, config.sharing, parallel))


def by_part(memory: TrainingMemory) -> str:
    """The sum and what it consists of."""
    return (
        f"{mib(memory.total)} = weights {mib(memory.weights)}"
        f" + gradients {mib(memory.gradients)} + optimizer {mib(memory.optimizer)}"
        f" + activations {mib(memory.activations)} + logits {mib(memory.logits)}"
    )


def mib(size: int) -> str:
    """Bytes, for a reader."""
    return f"{size / _MIB:,.0f} MiB"


def end(run: Run, valid_loss: float | None, typed: Typed) -> str:
    """Final perplexity, where the checkpoint is and what to do next."""
    progress, total = run.progress, run.config.train.train_iters
    lines = [f"Done: {progress.step:,} steps, {progress.tokens:,} tokens."]
    if run.stopped_by:
        lines = [f"Stopped by {run.stopped_by} after step {progress.step:,} of {total:,}."]
    elif progress.health.alarms:
        lines = [f"Ended after {progress.step:,} steps, {progress.tokens:,} tokens."]
    lines += _signs_of_divergence(progress.health)
    if progress.skipped_steps:
        lines.append(f"{progress.skipped_steps} steps were skipped (NaN, Inf or a spike).")
    if valid_loss is not None:
        lines.append(
            f"Validation loss {valid_loss:.4f}, validation perplexity {perplexity(valid_loss):.2f}."
        )
    if run.saved is None:
        return "\n".join(lines)
    lines += [f"Checkpoint: {run.saved}", "Next:"]
    if run.stopped_by:
        again = [*without(typed.run, "--resume"), "--resume", "auto"]
        return "\n".join([*lines, f"  go on:         {shlex.join(again)}"])
    return "\n".join([*lines, *_next_steps(run, typed)])


def _signs_of_divergence(health: Health) -> list[str]:
    if not health.alarms:
        return []
    return [
        "The run shows signs of divergence; find out why before you use the model:",
        *(f"  {alarm.cause} in step {alarm.step:,}: {alarm.seen}." for alarm in health.alarms),
    ]


def _next_steps(run: Run, typed: Typed) -> list[str]:
    root = run.config.checkpoint.save or ""
    plan = [*typed.program, "plan", "--num-layers", str(run.plan.map.num_layers)]
    plan += ["--kv-map", run.plan.map.notation]
    export = [*typed.program, "convert", "to-hf", "--load", root]
    export += ["--save", str(Path(root).with_name("hf"))]
    return [
        *commands_to_train_on(run.config, typed.run),
        f"  study the map: {shlex.join(plan)}",
        f"  export:        {shlex.join(export)}",
    ]


def _indented(lines: Sequence[str]) -> list[str]:
    return ["  " + line for line in lines]
