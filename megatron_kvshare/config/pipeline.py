"""Pipeline stages of a configuration, and their rules (L1)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_kvshare.config.model import ModelConfig, ParallelConfig, SharingConfig
from megatron_kvshare.config.rule import rule
from megatron_kvshare.config.rules_model import HasParallel, divisor, sharing_map
from megatron_kvshare.config.schema import PretrainConfig
from megatron_kvshare.config.shape import execution_plan, recipe
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.sharing.draw_stages import stage_lines
from megatron_kvshare.sharing.layout import (
    LAYOUT_FLAG,
    Layout,
    even_layout,
    parse_layout,
)
from megatron_kvshare.sharing.placement import PayloadShape, Placement
from megatron_kvshare.sharing.shape import ModelShape
from megatron_kvshare.sharing.solver import Start

_VIRTUAL = "--num-layers-per-virtual-pipeline-stage"
_SIZE = "--pipeline-model-parallel-size"


def stage_layout(num_layers: int, parallel: ParallelConfig) -> Layout:
    """Layers of every stage, virtual ones included. Raises :class:`ConfigError`."""
    ranks, text = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_layout
    each = parallel.num_layers_per_virtual_pipeline_stage
    if ranks == 1:
        return _one_stage(num_layers, parallel)
    if text is not None:
        if each is not None:
            rule_text = f"{LAYOUT_FLAG} says how many layers each stage has"
            raise ConfigError(Fault(_VIRTUAL, each, rule_text, f"drop {_VIRTUAL}"))
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
        raise ConfigError(Fault(_VIRTUAL, each, rule_text, f"use {divisor(places, each)}"))
    return even_layout(num_layers, ranks * (places // each), *ends)


def _one_stage(num_layers: int, parallel: ParallelConfig) -> Layout:
    given = {
        _VIRTUAL: parallel.num_layers_per_virtual_pipeline_stage,
        LAYOUT_FLAG: parallel.pipeline_model_parallel_layout,
    }
    rule_text = f"it needs several pipeline processes ({_SIZE})"
    faults = [
        Fault(flag, value, rule_text, f"use {_SIZE} 2 or more, or drop {flag}")
        for flag, value in given.items()
        if value is not None
    ]
    if faults:
        raise ConfigError(faults)
    return (num_layers,)


def placement(model: ModelConfig, sharing: SharingConfig, parallel: ParallelConfig) -> Placement:
    """Which stage holds which layers. Raises :class:`ConfigError`."""
    layout = stage_layout(model.num_layers, parallel)
    return Placement(sharing_map(model, sharing), layout, parallel.pipeline_model_parallel_size)


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


def pipeline_lines(
    model: ModelConfig,
    sharing: SharingConfig,
    parallel: ParallelConfig,
    micro_batch_size: int,
    shape: ModelShape,
) -> list[str]:
    """The stage table; empty without pipeline stages."""
    if parallel.pipeline_model_parallel_size == 1:
        return []
    payload = payload_shape(model, parallel, micro_batch_size, shape)
    placed = placement(model, sharing, parallel)
    return stage_lines(execution_plan(model, sharing), placed, payload)


_LAYOUT_SETTINGS = (
    "num_layers pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage"
    " pipeline_model_parallel_layout account_for_embedding_in_pipeline_split"
    " account_for_loss_in_pipeline_split"
)
_MAP_SETTINGS = " kv_pattern kv_layers kv_map"


@rule(_LAYOUT_SETTINGS)
def layers_divide(config: HasParallel) -> Iterator[Fault]:
    """Every layer is in exactly one stage."""
    try:
        stage_layout(config.model.num_layers, config.parallel)
    except ConfigError as error:
        yield from error.faults


@rule(_LAYOUT_SETTINGS + _MAP_SETTINGS + " kv_recipe kv_start kv_tolerance overlap_grad_reduce")
def spanning_groups_can_run(config: PretrainConfig) -> Iterator[Fault]:
    """What does not work where sweeps go round the pipeline: decisions and weights of a later
    stage, and reductions that count on one backward per weight."""
    try:
        placed = placement(config.model, config.sharing, config.parallel)
    except ConfigError:
        return
    if not placed.spanning_groups:
        return
    layer, source = next(placed.upward_reads_across_stages())
    where = (
        f"layer {layer} on stage {placed.stage_of(layer).number} reads keys and values that layer"
        f" {source} makes on stage {placed.stage_of(source).number}"
    )
    inside = f"or choose a {LAYOUT_FLAG} with the group inside one stage"
    if recipe(config.sharing).start is Start.SELF:
        rule_text = f"{where}, and the first sweep would need that layer's weights here"
        yield Fault("--kv-start", "self", rule_text, f"use --kv-start zero or input, {inside}")
    if config.sharing.kv_tolerance is not None:
        rule_text = f"{where}: the number of sweeps round the pipeline must be known before"
        fix = f"drop --kv-tolerance and give --kv-forward-sweeps, {inside}"
        yield Fault("--kv-tolerance", config.sharing.kv_tolerance, rule_text, fix)
    if config.parallel.overlap_grad_reduce:
        rule_text = f"{where}: its weights get gradients several times in a microbatch"
        yield Fault("--overlap-grad-reduce", True, rule_text, f"drop it, {inside}")


@rule(_LAYOUT_SETTINGS + " overlap_param_gather")
def overlap_of_stages(config: PretrainConfig) -> Iterator[Fault]:
    """Gathering weights layer by layer is not arranged over several stages."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size > 1 and parallel.overlap_param_gather:
        rule_text = f"it is not supported with {_SIZE} above 1"
        yield Fault("--overlap-param-gather", True, rule_text, "drop it")


def microbatch_faults(config: PretrainConfig, num_microbatches: int) -> Iterator[Fault]:
    """The interleaved schedule sends microbatches round in groups of at least as many as there are
    ranks."""
    ranks = config.parallel.pipeline_model_parallel_size
    try:
        placed = placement(config.model, config.sharing, config.parallel)
    except ConfigError:
        return
    if placed.chunks > 1 and not placed.spanning_groups and num_microbatches < ranks:
        batch = config.train.global_batch_size
        rule_text = (
            f"a step has {num_microbatches} microbatches, but virtual stages need at least"
            f" {_SIZE} {ranks}"
        )
        least = (batch or 1) * ranks // num_microbatches
        fix = f"use --global-batch-size {least} or more, or drop {_VIRTUAL}"
        yield Fault("--global-batch-size", batch, rule_text, fix)


PIPELINE_RULES = (layers_divide, spanning_groups_can_run, overlap_of_stages)
