"""What a run says before it starts and after it has ended, as text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.checkpoint.manifest import Health
from megatron_kvshare.config.flags.describe import describe
from megatron_kvshare.costs import cost
from megatron_kvshare.costs.memory import TrainingMemory
from megatron_kvshare.costs.weights import parameters_by_component
from megatron_kvshare.data.data_plan import DataPlan
from megatron_kvshare.sharing.solver import recipe_name
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.tables import maps as draw
from megatron_kvshare.tables.engines import engine_lines
from megatron_kvshare.tables.stages import stage_lines
from megatron_kvshare.train.learning_rate import commands_to_train_on, without
from megatron_kvshare.train.loop import FinalLosses
from megatron_kvshare.train.metrics import perplexity
from megatron_kvshare.train.run import Run

_MIB = 2**20


class Typed(NamedTuple):
    """Words of commands: the one that starts this ``run`` again, and the ``program`` alone."""

    run: Sequence[str]
    program: Sequence[str]


def start(planned: RunPlan, spec: ModelSpec, data: DataPlan, device: str) -> str:
    """Configuration, map, parameters, layout, memory and data plan; needs no process group."""
    return "\n".join(
        [
            "Configuration",
            *_indented(describe(planned.config).splitlines()),
            "",
            *_model_lines(planned, spec),
            *_layout_lines(planned, spec, device),
            "Data",
            *_indented([*data.lines(), *data.notes()]),
        ]
    )


def _model_lines(planned: RunPlan, spec: ModelSpec) -> list[str]:
    plan = planned.plan
    costs = cost.costs(spec.shape, plan)
    parts = parameters_by_component(spec.shape, plan.map)
    owners = len(plan.map.producers)
    lines = [
        f"map {plan.map.notation}",
        f"{owners} of {plan.map.num_layers} layers own keys and values: KV cache "
        f"{costs.kv_bytes_per_token:,} bytes per token, 1/{costs.kv_reduction:.2f} of standard",
        *([f"recipe {recipe_name(planned.recipe)}"] if plan.groups else []),
        draw.sweeps_text(plan),
        f"training FLOPs {costs.train_flops_ratio:.2f} x the standard map's",
        f"parameters {costs.parameters:,}: "
        + ", ".join(
            f"{name.replace('_', ' ')} {count:,}" for name, count in parts.items() if count
        ),
    ]
    return ["Model", *_indented(lines)]


def _layout_lines(planned: RunPlan, spec: ModelSpec, device: str) -> list[str]:
    config, layout, world_size = planned.config, planned.batch, planned.world_size
    parallel, train = config.parallel, config.train
    memory = planned.memory(spec)
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
    if planned.zero is not None:
        layout_of_rank = planned.training_layout
        lines += engine_lines(spec.shape, planned.plan, layout_of_rank, planned.zero)
    stages = stage_lines(planned.plan, planned.placement, planned.payload(spec))
    return ["Layout", *_indented(lines), *_indented(stages)]


def by_part(memory: TrainingMemory) -> str:
    """The sum and what it consists of."""
    parts = (f"{name} {mib(size)}" for name, size in asdict(memory).items())
    return f"{mib(memory.total)} = {' + '.join(parts)}"


def mib(size: int) -> str:
    """Bytes, for a reader."""
    return f"{size / _MIB:,.0f} MiB"


def end(run: Run, losses: FinalLosses, typed: Typed) -> str:
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
    for name, loss in (("validation", losses.valid), ("test", losses.test)):
        if loss is not None:
            lines.append(
                f"{name.capitalize()} loss {loss:.4f}, {name} perplexity {perplexity(loss):.2f}."
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
