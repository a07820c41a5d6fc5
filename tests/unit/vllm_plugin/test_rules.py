"""What vLLM is told of a map, and what is refused to it; needs no vLLM. The plugin itself is run by
tests/integration/test_vllm.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.conversion.settings import to_config
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.vllm_plugin.rules import (
    Engine,
    faults,
    keeps_all_tokens,
    rope_parameters,
    sharing_of,
    target_name,
)
from tests.huggingface import model_spec
from tests.maps import named_maps, random_map

MAPS = {**named_maps(8), **{f"random.{seed}": random_map(seed, 8) for seed in range(100)}}
CLA = SharingMap.parse("0_0_2_2_4_4_6_6")
PLAIN = Engine(
    stages=(range(8),),
    tensor_ranks=1,
    context_ranks=1,
    fast_prefill=False,
    adapters=False,
    cache_dtype="auto",
    unquantised_layers=(),
    longest=64,
)


def config_of(sharing: SharingMap, **settings) -> KVShareConfig:
    """As an export says it; ``settings`` overrule it."""
    content = to_config(model_spec(sharing), torch.float32, {})
    own = {"kv_source_layers": list(sharing.sources), "model_type": "kvshare"}
    return KVShareConfig(**{**content, **own, **settings})


def found(sharing: SharingMap, engine: Engine = PLAIN, **settings) -> list[str]:
    config = config_of(sharing, **settings)
    return [str(fault) for fault in faults(config.to_dict(), sharing_of(config), engine)]


def test_a_map_is_read_back_as_it_was_exported():
    for name, sharing in MAPS.items():
        assert sharing_of(config_of(sharing)) == sharing, name


def test_every_acyclic_map_is_served_and_no_other():
    cyclic = {name for name, sharing in MAPS.items() if sharing.is_cyclic}
    assert len(cyclic) > 20 and len(MAPS) - len(cyclic) > 10
    for name, sharing in MAPS.items():
        faults_of = found(sharing)
        assert bool(faults_of) == (name in cyclic), (name, faults_of)
        assert all("`kvshare serve` serves this model" in text for text in faults_of)


def test_a_cyclic_map_says_which_layers_it_is():
    (text,) = found(SharingMap.parse("0_1_6_6_6_6_6_7"))
    assert "kv_source_layers = '0_1_6_6_6_6_6_7'" in text and "layers 2-5" in text
    (text,) = found(SharingMap.parse("0_2_2_3_4_5_6_7"))
    assert "by layer 1." in text


def test_targets_are_earlier_layers_with_a_cache_of_their_own():
    """What vLLM demands of ``kv_sharing_target_layer_name``."""
    for sharing in MAPS.values():
        if sharing.is_cyclic:
            continue
        names = {}
        for layer in range(8):
            names[layer] = target_name(sharing, layer, f"model.layers.{layer}.self_attn")
            if names[layer] is not None:
                source = int(names[layer].split(".")[2])
                assert source < layer and names[source] is None
                assert names[layer] == f"model.layers.{source}.self_attn.attn"
        assert [names[layer] is None for layer in range(8)] == [
            sharing.is_producer(layer) for layer in range(8)
        ]


def test_a_target_is_named_inside_a_larger_model():
    sharing = SharingMap(tuple([*range(12), 1]), (False,) * 13)
    name = target_name(sharing, 12, "draft.12.model.layers.12.self_attn")
    assert name == "draft.12.model.layers.1.self_attn.attn"


@pytest.mark.parametrize(
    ("notation", "whole"),
    [("0s_0_2s_2s", [0]), ("0s_0s_2_2s", []), ("0s_0s_0_3s", [0]), ("0_1_2_3", [])],
)
def test_what_a_layer_without_window_reads_is_kept(notation, whole):
    sharing = SharingMap.parse(notation)
    assert [layer for layer in range(4) if keeps_all_tokens(sharing, layer)] == whole


REFUSED = {
    "fast prefill": (replace(PLAIN, fast_prefill=True), "--kv-sharing-fast-prefill"),
    "adapters": (replace(PLAIN, adapters=True), "--enable-lora"),
    "a cut group": (
        replace(PLAIN, stages=(range(3), range(3, 8))),
        "--pipeline-parallel-size = 2: keys and values of another stage are read by layer 3",
    ),
    "several cut groups": (
        replace(PLAIN, stages=(range(1), range(1, 3), range(3, 5), range(5, 8))),
        "read by layers 1, 3, 5",
    ),
    "context parallel": (replace(PLAIN, context_ranks=2), "--decode-context-parallel-size"),
    "scales of a layer": (
        replace(PLAIN, cache_dtype="int8_per_token_head"),
        "--kv-cache-dtype = 'int8_per_token_head'",
    ),
    "types that differ": (
        replace(PLAIN, cache_dtype="fp8", unquantised_layers=("2", "4", "5")),
        "would be read by layer 3",
    ),
    "heads that cannot be divided": (replace(PLAIN, tensor_ranks=3), "--tensor-parallel-size = 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_would_give_wrong_text_is_refused(name):
    engine, wanted = REFUSED[name]
    (text,) = found(CLA, engine)
    assert wanted in text


def test_windows_and_full_attention_read_one_type():
    sharing = SharingMap.parse("0_0s_2s_2s")
    engine = replace(PLAIN, cache_dtype="fp8", unquantised_layers=("sliding_window",))
    (text,) = found(sharing, replace(engine, stages=(range(4),)))
    assert "would be read by layer 1." in text


SERVED = {
    "pipeline stages between groups": replace(PLAIN, stages=(range(4), range(4, 8))),
    "more ranks than heads": replace(PLAIN, tensor_ranks=4),
    "fp8": replace(PLAIN, cache_dtype="fp8"),
    "whole groups left as they are": replace(
        PLAIN, cache_dtype="fp8", unquantised_layers=("2", "3")
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_other_settings_are_left_alone(name):
    assert not found(CLA, SERVED[name])


LLAMA3 = {
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 2.0, "original_max_position_embeddings": 32}
DYNAMIC = {"factor": 2.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}


@pytest.mark.parametrize(
    ("kind", "parameters", "refusal"),
    [
        ("default", {}, None),
        ("llama3", LLAMA3, None),
        ("linear", {"factor": 2.0}, None),
        ("yarn", {**YARN, "beta_fast": 16.0, "attention_factor": 1.1}, None),
        ("yarn", {**YARN, "factor": 1.5}, "give --max-model-len 48"),
        ("dynamic", DYNAMIC, "the length of the text"),
        ("longrope", {**LONG, "original_max_position_embeddings": 32}, "the length of the text"),
    ],
)
def test_rotary_embeddings_that_vllm_computes_otherwise_are_refused(kind, parameters, refusal):
    rope = {"rope_type": kind, "rope_theta": 5e5, **parameters}
    texts = found(CLA, rope_parameters=rope)
    if refusal is None:
        assert not texts
        told = rope_parameters(config_of(CLA, rope_parameters=rope).rope_parameters)
        assert told == rope and isinstance(told.get("factor", 1.0), float)
    else:
        assert len(texts) == 1 and refusal in texts[0]


def test_what_transformers_does_not_read_is_not_told():
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], "alpha": 2}
    assert rope_parameters(rope) == {"rope_type": "default", "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [("logit_scale", 2.0), ("qkv_bias", True), ("final_logit_softcapping", 30.0)],
)
def test_a_setting_that_the_export_does_not_compute_is_refused(key, value):
    """vLLM's Llama heeds the first two."""
    (text,) = found(CLA, **{key: value})
    assert f"config.json: {key} = {value!r}" in text


def test_quantised_weights_are_refused():
    (text,) = found(CLA, quantization_config={"quant_method": "fp8"})
    assert "quantization_config" in text


def test_everything_is_told_at_once():
    engine = replace(PLAIN, fast_prefill=True, context_ranks=2, cache_dtype="nvfp4")
    texts = found(SharingMap.parse("0_6_2_3_4_5_6_7"), engine, logit_scale=2.0)
    assert len(texts) == 5
