"""What settings come to: the map, how it is computed, which stage holds what, the batch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from megatron_kvshare.config.fields.model import ModelConfig, ParallelConfig, SharingConfig
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.config.fields.training import CheckpointConfig
from megatron_kvshare.config.flags.rule import divisor
from megatron_kvshare.costs.memory import TrainingLayout
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.sharing import patterns
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import (
    DEFAULT_RECIPE,
    RECIPES,
    Recipe,
    Solver,
    Start,
    Tolerance,
    name_of,
    solver_plan,
)
from megatron_kvshare.stages.layout import LAYOUT_FLAG, Layout, even_layout, parse_layout
from megatron_kvshare.stages.placement import PayloadShape, Placement

_USUAL_STRIDE = {Solver.JACOBI: 1, Solver.STRIDED: 4}
VIRTUAL_FLAG = "--num-layers-per-virtual-pipeline-stage"
SIZE_FLAG = "--pipeline-model-parallel-size"


def sharing_map(model: ModelConfig, sharing: SharingConfig) -> SharingMap:
    """The map that the settings ask for. Raises :class:`MapError`."""
    return patterns.build_map(
        model.num_layers, sharing.kv_pattern, sharing.kv_layers, sharing.kv_map
    )


def recipe(sharing: SharingConfig, usual: Recipe = RECIPES[DEFAULT_RECIPE]) -> Recipe:
    """How cyclic groups are computed; flags of parts change ``usual`` where none says what they
    change. Raises :class:`MapError`."""
    named = _named(sharing) or usual
    solver = Solver(sharing.kv_solver or named.solver)
    stride = named.stride if solver is named.solver else _USUAL_STRIDE[solver]
    forward, backward = sharing.kv_forward_sweeps, sharing.kv_backward_sweeps
    return Recipe(
        solver=solver,
        stride=stride if sharing.kv_stride is None else sharing.kv_stride,
        forward_sweeps=named.forward_sweeps if forward is None else forward,
        backward_sweeps=named.backward_sweeps if backward is None else backward,
        start=Start(sharing.kv_start or named.start),
        project_at_use=sharing.kv_project_at_use or named.project_at_use,
    )


def _named(sharing: SharingConfig) -> Recipe | None:
    """By ``--kv-recipe``, or the published passes for who writes them as the method's users do:
    ``--kv-forward-sweeps 7 --kv-backward-sweeps 2``, or ``--kv-solver jacobi``."""
    if sharing.kv_recipe is not None:
        return RECIPES[sharing.kv_recipe]
    sweeps = (sharing.kv_forward_sweeps, sharing.kv_backward_sweeps)
    published = sharing.kv_solver == "jacobi" or any(number is not None for number in sweeps)
    return RECIPES["paper"] if published else None


def takes_usual_recipe(sharing: SharingConfig) -> bool:
    """Whether the settings leave open which recipe it is whose parts they may change."""
    return _named(sharing) is None


def with_recipe(sharing: SharingConfig, recipe: Recipe) -> SharingConfig:
    """The settings that say all of ``recipe``, whatever is usual."""
    parts: dict[str, Any] = {"kv_recipe": name_of(recipe)}
    if parts["kv_recipe"] is None:
        parts = {f"kv_{name}": value for name, value in recipe.as_dict().items()}
        parts["kv_recipe"] = "paper"
    return replace(sharing, **parts)


def training_plan(map: SharingMap, recipe: Recipe, sharing: SharingConfig) -> ExecutionPlan:
    """The sweeps of training."""
    tolerance = _tolerance(sharing) if sharing.kv_tolerance_in_training else None
    return solver_plan(map, recipe, tolerance)


def evaluation_plan(map: SharingMap, recipe: Recipe, sharing: SharingConfig) -> ExecutionPlan:
    """The sweeps of an evaluation: those of training, or as many as ``--kv-tolerance`` needs."""
    return solver_plan(map, recipe, _tolerance(sharing))


def _tolerance(sharing: SharingConfig) -> Tolerance | None:
    if sharing.kv_tolerance is None:
        return None
    return Tolerance(
        residual=sharing.kv_tolerance, least=sharing.kv_min_sweeps, most=sharing.kv_max_sweeps
    )


def stage_layout(num_layers: int, parallel: ParallelConfig) -> Layout:
    """Layers of every stage, virtual ones included. Raises :class:`ConfigError`."""
    ranks, text = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_layout
    each = parallel.num_layers_per_virtual_pipeline_stage
    if ranks == 1:
        return _one_stage(num_layers, parallel)
    if text is not None:
        if each is not None:
            rule_text = f"{LAYOUT_FLAG} says how many layers each stage has"
            raise ConfigError(Fault(VIRTUAL_FLAG, each, rule_text, f"drop {VIRTUAL_FLAG}"))
        return parse_layout(text, num_layers, ranks)
    ends = (
        parallel.account_for_embedding_in_pipeline_split,
        parallel.account_for_loss_in_pipeline_split,
    )
    layout = even_layout(num_layers, ranks, *ends)
    if each is None:
        return layout
    places = (num_layers + sum(ends)) // ranks
    if places % each:
        rule_text = f"it must divide the {places} layers of each pipeline process"
        raise ConfigError(Fault(VIRTUAL_FLAG, each, rule_text, f"use {divisor(places, each)}"))
    return even_layout(num_layers, ranks * (places // each), *ends)


def _one_stage(num_layers: int, parallel: ParallelConfig) -> Layout:
    given = {
        VIRTUAL_FLAG: parallel.num_layers_per_virtual_pipeline_stage,
        LAYOUT_FLAG: parallel.pipeline_model_parallel_layout,
    }
    rule_text = f"it needs several pipeline processes ({SIZE_FLAG})"
    faults = [
        Fault(flag, value, rule_text, f"use {SIZE_FLAG} 2 or more, or drop {flag}")
        for flag, value in given.items()
        if value is not None
    ]
    if faults:
        raise ConfigError(faults)
    return (num_layers,)


def placement(map: SharingMap, parallel: ParallelConfig) -> Placement:
    """Which stage holds which layers. Raises :class:`ConfigError`."""
    layout = stage_layout(map.num_layers, parallel)
    return Placement(map, layout, parallel.pipeline_model_parallel_size)


def model_shape(model: ModelConfig, vocab_size: int, window_size: int | None) -> ModelShape:
    """The sizes that costs depend on; ``vocab_size``: the true one."""
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size or 0,  # always filled in by ModelConfig
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        vocab_size=vocab_size,
        seq_length=model.seq_length,
        window_size=window_size,
        tied_embeddings=not model.untie_embeddings_and_output_weights,
    )


def payload_shape(
    model: ModelConfig, parallel: ParallelConfig, micro_batch_size: int, shape: ModelShape
) -> PayloadShape:
    """One microbatch on its way between stages."""
    return PayloadShape.of(
        shape,
        micro_batch_size,
        bytes_per_element=2 if model.bf16 else 4,
        tensor_ranks=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )


def training_layout(
    model: ModelConfig, parallel: ParallelConfig, micro_batch_size: int, replicas: int
) -> TrainingLayout:
    """What the memory of a process depends on, besides the model."""
    return TrainingLayout(
        micro_batch_size=micro_batch_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        data_parallel_size=replicas,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        sequence_parallel=parallel.sequence_parallel,
        bf16=model.bf16,
        recompute_full=model.recompute_granularity == "full",
    )


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is spread: its size = micro batch x microbatches x replicas."""

    data_parallel_size: int
    global_batch_size: int
    num_microbatches: int


def batch_layout(config: PretrainConfig, world_size: int) -> BatchLayout:
    """How the global batch is spread over ``world_size`` processes (which passed the rules)."""
    micro = config.train.micro_batch_size
    replicas = world_size // config.parallel.model_parallel_size
    batch = config.train.global_batch_size or micro * replicas
    return BatchLayout(replicas, batch, batch // (micro * replicas))


def step_of_tag(tag: str | None) -> int | None:
    """The step of the checkpoint that ``--load-tag`` names; None where it is no such name."""
    found = re.fullmatch("(?:global_step|iter_)([0-9]{1,18})", tag or "")
    return None if found is None else int(found[1])


def checkpoint_settings(config: PretrainConfig) -> CheckpointConfig:
    """What to load and save, with ``--load-tag`` as the step that it names."""
    step = step_of_tag(config.deepspeed.load_tag)
    return config.checkpoint if step is None else replace(config.checkpoint, ckpt_step=step)
