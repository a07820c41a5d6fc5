"""The table of tensors against transformers' Llama and against our modules, stage by stage."""

from __future__ import annotations

from collections import defaultdict

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_kvshare.config import ParallelConfig, TrainConfig
from megatron_kvshare.costs.weights import parameters, parameters_by_component, stage_parameters
from megatron_kvshare.megatron_api.optimizer import build_optimizer, wrap_stages
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT, build_stages
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import jacobi_plan
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.stages.placement import Placement
from tests.product import Tiny

# No padding: every element of a module is one of the model.
TINY = Tiny(vocabulary=48, extra={"kv_channels": 6})
MAPS = {
    "standard": build_map(8),
    "sandwich-top": build_map(8, "sandwich-top", 3),
    "cla": build_map(8, "cla:2"),
    "one producer": SharingMap.parse("5_5_5_5_5_5_5_5"),
}
LAYOUTS = {"whole": ((8,), 1), "two": ((3, 5), 2), "virtual": ((2, 1, 3, 2), 2)}
each_map = pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)
tied_or_not = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


def stages(
    spec: ModelSpec, state: ParallelState, layout: tuple[int, ...] = (8,), ranks: int = 1
) -> list[KVShareGPT]:
    """Every stage of a model, all in this process."""
    placed = Placement(spec.map, layout, ranks).stages
    return build_stages(spec, ParallelConfig(), jacobi_plan(spec.map), placed, state)


@tied_or_not
def test_names_and_shapes_are_those_of_transformers(untied: bool) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=8,
            hidden_size=TINY.hidden,
            intermediate_size=TINY.ffn,
            num_attention_heads=TINY.heads,
            num_key_value_heads=TINY.kv_heads,
            head_dim=6,
            vocab_size=48,
            tie_word_embeddings=not untied,
        )
    )
    theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert TINY.but(untied=untied).spec(build_map(8)).weight_shapes == theirs


@each_map
@tied_or_not
@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_stage_holds_what_the_table_says(
    map: SharingMap, untied: bool, layout: tuple[int, ...], ranks: int, single: ParallelState
) -> None:
    spec = TINY.but(untied=untied).spec(map)
    total = 0
    for model in stages(spec, single, layout, ranks):
        held = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        rows: dict[str, int] = defaultdict(int)
        for weight in spec.weights_on(model.stage):
            name = weight.parameter_on(model.stage)
            rows[name] += weight.shape[0]
            assert held[name][1:] == weight.shape[1:]
        assert rows == {name: shape[0] for name, shape in held.items()}
        elements = sum(weight.numel() for weight in model.parameters())
        assert stage_parameters(spec.shape, map, model.stage) == elements
        total += elements - sum(model.get_parameter(name).numel() for name in model.copies)
    assert parameters(spec.shape, map) == total


@each_map
@tied_or_not
def test_parts_are_those_of_the_modules(
    map: SharingMap, untied: bool, single: ParallelState
) -> None:
    spec = TINY.but(untied=untied).spec(map)
    (model,) = stages(spec, single)
    found: dict[str, int] = defaultdict(int)
    for name, weight in model.named_parameters():
        kind = next(part for part in (*PARTS, "norm") if part in name)
        found[PARTS.get(kind, "norms")] += weight.numel()
    projections = [layer.self_attention.linear_qkv.weight for layer in model.decoder.layers]
    found["keys_and_values"] = sum(weight.shape[0] - 24 for weight in projections) * TINY.hidden
    found["attention"] -= found["keys_and_values"]
    assert {
        name: size for name, size in parameters_by_component(spec.shape, map).items() if size
    } == {name: size for name, size in found.items() if size}


PARTS = {
    "embedding": "embedding",
    "output_layer": "output_head",
    "self_attention": "attention",
    "mlp": "mlp",
}


@tied_or_not
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_optimizer_decays_what_the_table_says(
    untied: bool, bf16: bool, single: ParallelState
) -> None:
    """All but the norms: counted in the optimizer's own groups, whose weights bf16 copies."""
    spec = TINY.but(untied=untied, extra={"bf16": bf16}).spec(MAPS["sandwich-top"])
    wrapped = wrap_stages(stages(spec, single), ParallelConfig())
    optimizer = build_optimizer(wrapped, TrainConfig(weight_decay=0.1), ParallelConfig(), bf16)
    groups = {0.0: 0, 1.0: 0}
    for group in optimizer.param_groups:
        groups[group["wd_mult"]] += sum(weight.numel() for weight in group["params"])
    norms = (2 * 8 + 1) * TINY.hidden
    assert groups == {0.0: norms, 1.0: parameters(spec.shape, spec.map) - norms}
    assert {each.name for each in spec.weights if not each.decays} == {
        "model.norm.weight",
        *(f"model.layers.{n}.input_layernorm.weight" for n in range(8)),
        *(f"model.layers.{n}.post_attention_layernorm.weight" for n in range(8)),
    }
