"""The files that travel with exports stand alone, so they repeat what the package knows: the same
numbers, names and defaults here and there."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given

from megatron_kvshare.conversion.config_keys import HARMLESS, MODEL_TYPE, ONE_VALUE, READ
from megatron_kvshare.conversion.exported import configuration_kvshare, modeling_kvshare
from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.conversion.settings import from_config
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import (
    CONVERGED_PREFILL,
    EXACT_RESIDUAL_BF16,
    EXACT_RESIDUAL_FP32,
    RECIPES,
    Recipe,
    Solver,
    Start,
    exact_plan,
)
from tests.unit.sharing.strategies import sharing_maps

CYCLIC = build_map(4, "sandwich-top", 2)
NEEDED = {
    "model_type": MODEL_TYPE,
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": CYCLIC.num_layers,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "kv_source_layers": list(CYCLIC.sources),
}
"""The keys without which the package refuses a config.json."""


def test_exact_evaluation() -> None:
    plan = exact_plan(CYCLIC, 64, EXACT_RESIDUAL_FP32)
    (group,) = (segment for segment in plan.segments if segment.is_cyclic)
    assert {sweep.stride for sweep in group.sweeps} == {modeling_kvshare._EXACT_STRIDE}
    assert modeling_kvshare._SETTLED[torch.float32] == EXACT_RESIDUAL_FP32
    assert modeling_kvshare._SETTLED_LOW_PRECISION == EXACT_RESIDUAL_BF16


def test_converged_prefill() -> None:
    stride, without_gradient, with_gradient = modeling_kvshare._CONVERGED
    assert (
        Recipe(
            solver=Solver.STRIDED,
            stride=stride,
            forward_sweeps=without_gradient,
            backward_sweeps=with_gradient,
        )
        == CONVERGED_PREFILL
    )


def test_what_a_file_leaves_out() -> None:
    """The package reads a short config.json as the class reads it."""
    short = from_config(NEEDED)
    assert short.identity == from_config(KVShareConfig(**NEEDED).to_dict()).identity
    assert short.model.init_method_std == KVShareConfig().initializer_range
    assert short.recipe == RECIPES["paper"]


@pytest.mark.parametrize("name", sorted(NEEDED.keys() - {"model_type", "kv_source_layers"}))
def test_nothing_else_may_be_left_out(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        from_config({key: value for key, value in NEEDED.items() if key != name})


def test_starts() -> None:
    with pytest.raises(ValueError) as raised:
        KVShareConfig(iter_start="elsewhere")
    assert str(tuple(map(str, Start))) in str(raised.value)


def test_every_setting_is_read() -> None:
    settings = inspect.signature(KVShareConfig.__init__).parameters.keys() - {"self", "kwargs"}
    assert settings <= READ[MODEL_TYPE] | HARMLESS


def test_what_is_built_in() -> None:
    built_in = configuration_kvshare._BUILT_IN
    both = built_in.keys() & ONE_VALUE.keys()
    assert {"hidden_act", "attention_bias", "mlp_bias"} <= both
    assert all(built_in[name] in ONE_VALUE[name] for name in both)


@given(sharing_maps())
def test_groups_of_a_map(sharing: SharingMap) -> None:
    config = KVShareConfig(
        num_hidden_layers=sharing.num_layers, kv_source_layers=list(sharing.sources)
    )
    assert config.kv_layers == list(sharing.producers)
    assert config.cyclic_groups == [tuple(group) for group in sharing.cyclic_groups]
