"""What is derived from settings: the same model by every way to it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.spec.run_plan import RunPlan

FLAGS = [
    "--use-rope-scaling --norm-epsilon 1e-6",
    "--rope-scaling-type yarn --rope-scaling-factor 4 --yarn-mscale 0.7 --yarn-mscale-all-dim 1",
    "--rope-scaling-type dynamic --rope-scaling-factor 4 --max-position-embeddings 4096",
    "--kv-pattern sandwich-top --kv-layers 3 --kv-recipe one-sweep --bf16",
    "--kv-map 0_2s_2_3_3_3_6_6 --window-size 7 --kv-forward-sweeps 1",
]


def planned(flags: str) -> RunPlan:
    argv = f"--mock-data --vocab-size 101 --num-layers 8 --num-query-groups 4 {flags}".split()
    return RunPlan.of(parse_pretrain(argv), 1)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_run_trains_the_model_of_its_settings(flags: str) -> None:
    run = planned(flags)
    config, spec = run.config, run.spec(101, "abc")
    assert spec == ModelSpec.of(config.model, config.sharing, 101, "abc")
    assert spec.map == run.plan.map == run.placement.map == run.evaluation_plan.map


@pytest.mark.parametrize("flags", FLAGS)
def test_a_model_is_found_again_by_its_identity(flags: str) -> None:
    """As JSON holds it; what is not part of it comes from the settings beside it."""
    run = planned(flags)
    spec = run.spec(101, "abc")
    identity, settings = json.loads(json.dumps([spec.identity, asdict(run.config.model)]))
    again = ModelSpec.of_identity(identity, settings)
    assert (again.map, again.window_size, again.shape) == (spec.map, spec.window_size, spec.shape)
    assert again.identity == spec.identity and again.weights == spec.weights
    assert again.model.bf16 == spec.model.bf16
    assert not spec.map.is_cyclic or again.recipe == spec.recipe


def test_both_ways_to_ask_for_llama_3_are_one_model() -> None:
    flags = ("--use-rope-scaling", "--rope-scaling-type llama3")
    old, new = (planned(each).spec(101, "abc").identity for each in flags)
    assert old == new and "rope_scaling_type" not in old
