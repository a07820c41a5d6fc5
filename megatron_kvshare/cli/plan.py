"""``kvshare plan``: draws a sharing map and prints what it costs, without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field
from typing import Any

from rich.console import Console

from megatron_kvshare.cli import plan_tables
from megatron_kvshare.config import (
    DeepSpeedConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    SharingConfig,
    TrainConfig,
)
from megatron_kvshare.config.deepspeed import ENGINE_RULES, told, zero_of
from megatron_kvshare.config.derive import (
    payload_shape,
    placement,
    sharing_map,
    training_layout,
    training_plan,
)
from megatron_kvshare.config.fields.types import SCHEMA, Count, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.config.flags.megatron_flags import MEGATRON_FLAGS
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.config.flags.sources import read_arguments
from megatron_kvshare.config.rules.model import (
    groups_fit,
    heads_fit,
    tensor_parallel_fits,
)
from megatron_kvshare.config.rules.pipeline import layers_divide
from megatron_kvshare.config.rules.solver import SOLVER_RULES
from megatron_kvshare.costs import cost
from megatron_kvshare.costs.weights import parameters_by_component
from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing import patterns
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import recipe_name
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.tables import maps as draw
from megatron_kvshare.tables.engines import engine_lines
from megatron_kvshare.tables.stages import stage_lines

_ASSUMED_VOCABULARY = 32000  # Llama's; only embedding and head depend on it

_EXAMPLES = """\
kvshare plan --kv-pattern sandwich-top --kv-layers 11
kvshare plan --num-layers 32 --kv-pattern cla:2 --num-query-groups 8 --json
kvshare plan --kv-pattern sandwich-top --kv-layers 11 --pipeline-model-parallel-size 2
kvshare plan --kv-pattern sandwich-top --kv-layers 11 --deepspeed --zero-stage 3 \\
    --data-parallel-size 8 --bf16
kvshare plan --kv-map 0_1s_1s_3s_0_5s_5s_7s --window-size 512
"""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class PlanConfig:
    """What to draw: a map for a model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    micro_batch_size: Count = 1
    """Sequences of a microbatch, for the payloads between pipeline stages and for memory."""
    data_parallel_size: Count = 1
    """With --deepspeed: copies of the model that share out its state, for the memory of each."""
    json: bool = False
    """Print one JSON object instead of the drawing."""


@rule("num_layers kv_pattern kv_layers kv_map")
def _map_is_valid(config: PlanConfig) -> Iterator[Fault]:
    """The map exists. A window size is not asked for: the map can be drawn without."""
    try:
        sharing_map(config.model, config.sharing)
    except MapError as error:
        yield from error.faults


def run(argv: Sequence[str]) -> int:
    """Draw the map that the flags ask for; with ``--json`` print it as data."""
    command = Command(
        prog="kvshare plan",
        description=_description(),
        examples=_EXAMPLES,
        rules=(
            heads_fit,
            groups_fit,
            _map_is_valid,
            *SOLVER_RULES,
            layers_divide,
            tensor_parallel_fits,
            *ENGINE_RULES,
        ),
        megatron=MEGATRON_FLAGS,
    )
    config = parse(PlanConfig, _with_layers_of_map(argv), command)
    vocabulary = config.model.vocab_size or _ASSUMED_VOCABULARY
    spec = ModelSpec.of(config.model, config.sharing, vocabulary)
    plan = training_plan(spec.map, spec.recipe, config.sharing)
    for warning in _warnings(spec):
        print(f"warning: {warning}", file=sys.stderr)
    if config.json:
        print(json.dumps(as_data(spec, plan)))
        return 0
    _draw(spec, plan, config.sharing)
    payload = payload_shape(config.model, config.parallel, config.micro_batch_size, spec.shape)
    stages = stage_lines(plan, placement(spec.map, config.parallel), payload)
    if stages:
        print("\nPipeline", *stages, sep="\n")
    if config.deepspeed.is_engine:
        print("\nEngines", *_engines(config, spec, plan), sep="\n")
    return 0


def _engines(config: PlanConfig, spec: ModelSpec, plan: ExecutionPlan) -> list[str]:
    """The memory of every engine, with DeepSpeed's file as far as it says anything of it."""
    parallel, replicas = config.parallel, config.data_parallel_size
    run = PretrainConfig(
        model=config.model,
        sharing=config.sharing,
        parallel=parallel,
        train=TrainConfig(micro_batch_size=config.micro_batch_size),
        deepspeed=config.deepspeed,
    )
    given = {"micro_batch_size": "--micro-batch-size"} if config.micro_batch_size > 1 else {}
    engine = told(run, parallel.model_parallel_size * replicas, given)
    layout = training_layout(
        engine.config.model, parallel, engine.config.train.micro_batch_size, replicas
    )
    return engine_lines(spec.shape, plan, layout, zero_of(engine.json))


def as_data(spec: ModelSpec, plan: ExecutionPlan) -> dict[str, Any]:
    """The plan and its costs as JSON values."""
    shape = spec.shape
    windowed = [layer for layer, marked in enumerate(plan.map.windowed) if marked]
    return {
        "num_layers": shape.num_layers,
        "notation": plan.map.notation,
        "kv_map": list(plan.map.sources),
        "kv_layers": len(plan.map.producers),
        "producers": list(plan.map.producers),
        "windowed_layers": windowed,
        "window_size": spec.window_size,
        "cyclic_groups": [list(group) for group in plan.map.cyclic_groups],
        "group_targets": [list(segment.targets) for segment in plan.groups],
        "recipe": spec.recipe.as_dict(),
        "vocab_size": shape.vocab_size,
        "kv_bytes_per_element": cost.KV_BYTES_PER_ELEMENT,
        **asdict(cost.costs(shape, plan)),
        "parameters_by_part": parameters_by_component(shape, plan.map),
    }


def _draw(spec: ModelSpec, plan: ExecutionPlan, sharing: SharingConfig) -> None:
    shape = spec.shape
    console = Console(highlight=False)
    ascii_only = console.options.ascii_only
    name = sharing.kv_pattern if sharing.kv_map is None else "explicit map"
    producers, layers = len(plan.map.producers), shape.num_layers
    title = f"{name}: {producers} of {layers} layers own keys and values"
    console.print(f"[bold]{title}[/bold] (KV cache / {layers / producers:.2f})")
    console.print(draw.map_table(plan, spec.window_size, ascii_only))
    if plan.map.is_cyclic:
        console.print(f"Recipe {recipe_name(spec.recipe)}.")
    console.print(draw.sweeps_text(plan))
    console.print(plan_tables.cost_table(shape, plan))
    if plan.map.is_cyclic:
        console.print(plan_tables.recipe_table(shape, plan.map))
        console.print(plan_tables.prefill_text(shape, plan.map))
    console.print(
        f"Shape: hidden {shape.hidden_size}, ffn {shape.ffn_hidden_size}, "
        f"{shape.num_attention_heads} heads, {shape.num_query_groups} KV heads, "
        f"sequence {shape.seq_length}, vocabulary {shape.vocab_size}.\n"
        f"As an explicit map: --kv-map {plan.map.notation}",
        soft_wrap=True,
    )


def _warnings(spec: ModelSpec) -> list[str]:
    found = patterns.warnings(spec.map, spec.window_size)
    if patterns.window_faults(spec.map, spec.window_size):
        found.append("without --window-size, costs count windowed layers as full attention")
    return found


def _with_layers_of_map(argv: Sequence[str]) -> list[str]:
    """An explicit map says how many layers there are, so ``--num-layers`` can be left out."""
    given = {each.key: each.values for each in read_arguments(argv)[0]}
    text = given.get("kv_map")
    if text and not {"num_layers", "config"} & given.keys():
        return [*argv, "--num-layers", str(len(text[0].strip().split("_")))]
    return list(argv)


def _description() -> str:
    names = patterns.help_rows()
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {text}" for name, text in names.items()]
    return "\n".join(
        [
            "Draws which layer reads whose keys and values, and what the map costs; needs no GPU.",
            "",
            "Patterns (l = --kv-layers, needed by the names with a dash):",
            *lines,
        ]
    )
