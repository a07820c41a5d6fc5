"""Rules of pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_kvshare.config.derive import (
    SIZE_FLAG,
    VIRTUAL_FLAG,
    placement,
    recipe,
    sharing_map,
    stage_layout,
)
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.config.rules.model import HasParallel
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.sharing.solver import Start
from megatron_kvshare.stages.layout import LAYOUT_FLAG
from megatron_kvshare.stages.placement import Placement

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
    placed = _placed(config)
    if placed is None or not placed.spanning_groups:
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
        rule_text = f"it is not supported with {SIZE_FLAG} above 1"
        yield Fault("--overlap-param-gather", True, rule_text, "drop it")


def microbatch_faults(config: PretrainConfig, num_microbatches: int) -> Iterator[Fault]:
    """The interleaved schedule sends microbatches round in groups of at least as many as there are
    ranks."""
    ranks = config.parallel.pipeline_model_parallel_size
    placed = _placed(config)
    if placed is None:
        return
    if placed.chunks > 1 and not placed.spanning_groups and num_microbatches < ranks:
        batch = config.train.global_batch_size
        rule_text = (
            f"a step has {num_microbatches} microbatches, but virtual stages need at least"
            f" {SIZE_FLAG} {ranks}"
        )
        least = (batch or 1) * ranks // num_microbatches
        fix = f"use --global-batch-size {least} or more, or drop {VIRTUAL_FLAG}"
        yield Fault("--global-batch-size", batch, rule_text, fix)


def _placed(config: PretrainConfig) -> Placement | None:
    """Which stage holds which layers; None where map or layout are at fault, which others tell."""
    try:
        return placement(sharing_map(config.model, config.sharing), config.parallel)
    except ConfigError:
        return None


PIPELINE_RULES = (layers_divide, spanning_groups_can_run, overlap_of_stages)
