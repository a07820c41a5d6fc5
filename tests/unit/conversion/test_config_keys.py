"""Every key of a config.json is read, of one value, without effect, or told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from megatron_kvshare.checkpoint.tensors import TensorSource
from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion import importing
from megatron_kvshare.conversion.config_keys import ONE_VALUE, READ, doubts
from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.conversion.folder import HuggingFaceWeights, read_json
from megatron_kvshare.conversion.settings import from_config, to_config
from megatron_kvshare.conversion.verify import LOGIT_LIMIT, same_logits
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import model_spec, write_folder

STANDARD = build_map(4, "standard")
LLAMA: dict[str, Any] = json.loads(json.dumps(to_config(model_spec(STANDARD), torch.float32, {})))
LCKV_OWN = {
    "layer_types": "0_2_2_3",
    "forward_passes": 7,
    "backward_passes": 2,
    "sliding_window": 4096,
    "use_sequential": False,
    "force_nodiag": False,
}
CYCLIC = build_map(4, "sandwich-top", 2)
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "lckv-llama": {**LLAMA, "model_type": "lckv-llama", **LCKV_OWN},
    "kvshare": to_config(model_spec(CYCLIC, RECIPES["two-sweep"]), torch.float32, {}),
}


def keys_named(error: CheckpointError) -> set[str]:
    return {fault.where.removeprefix("config.json: ") for fault in error.faults}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_usual_is_read_without_a_word(kind: str) -> None:
    from_config(KINDS[kind])
    assert doubts(KINDS[kind]) == []


def test_all_that_transformers_writes_is_known() -> None:
    for config in (LlamaConfig(), MistralConfig(), KVShareConfig(), LlamaConfig(head_dim=64)):
        content = json.loads(config.to_json_string(use_diff=False))
        assert doubts(content) == [], config.model_type
        from_config({**content, "dtype": "float32"})


def other_values(allowed: tuple[Any, ...]) -> Iterator[Any]:
    yield from (value for value in (True, 3, 0.5, "other", [1], {"0": {}}) if value not in allowed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", sorted(ONE_VALUE))
def test_a_key_that_makes_another_model_is_an_error(kind: str, key: str) -> None:
    if key in READ[kind]:
        return
    for value in ONE_VALUE[key]:
        from_config({**KINDS[kind], key: value})
    for value in other_values(ONE_VALUE[key]):
        with pytest.raises(CheckpointError) as raised:
            from_config({**KINDS[kind], key: value})
        assert keys_named(raised.value) == {key}


def test_full_attention_may_be_written_out() -> None:
    kinds = {"layer_types": ["full_attention"] * 4}
    assert from_config({**LLAMA, **kinds}).identity == from_config(LLAMA).identity
    with pytest.raises(CheckpointError, match="layer_types"):
        from_config({**LLAMA, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]})


def test_all_of_them_are_named_at_once() -> None:
    wrong = {"force_nodiag": True, "hidden_act": "gelu", "vocab_size": 0, "rope_theta": -1.0}
    with pytest.raises(CheckpointError) as raised:
        from_config({**KINDS["lckv-llama"], **wrong})
    assert keys_named(raised.value) == wrong.keys()


def test_unknown_keys_and_dropout_are_told() -> None:
    told = {"new_gate": 1, "rope_parameters": {"rope_theta": 1e4, "twist": 2}}
    lines = doubts({**LLAMA, **told, "attention_dropout": 0.1, "_private": 1})
    assert "new_gate, rope_parameters.twist: not known" in lines[0]
    assert "attention_dropout = 0.1" in lines[1] and len(lines) == 2


# Each kind of model -----------------------------------------------------------------------------


def lckv(**changes: Any) -> dict[str, Any]:
    content = {**KINDS["lckv-llama"], **changes}
    return {key: value for key, value in content.items() if value is not ...}


def test_lckv_windows_are_as_wide_as_their_code_makes_them() -> None:
    about = from_config(lckv(layer_types="0s_1_2_3", sliding_window=...))
    assert (about.window_size, about.map.windowed) == (4096, (True, False, False, False))
    about = from_config(lckv(layer_types="0s_1_2_3", sliding_window=None))
    assert (about.window_size, any(about.map.windowed)) == (None, False)
    about = from_config(lckv(layer_types=..., forward_passes=..., backward_passes=...))
    assert about.map == STANDARD
    assert (about.recipe.forward_sweeps, about.recipe.backward_sweeps) == (7, 2)


LCKV_WRONG = {
    "kinds of layers": ("layer_types", ["full_attention"] * 4),
    "no map": ("layer_types", 3),
    "words": ("layer_types", "full_full_full_full"),
    "no diagonal": ("force_nodiag", True),
    "token by token": ("use_sequential", True),
    "sweeps in text": ("forward_passes", "7"),
    "no width": ("sliding_window", 0),
}


@pytest.mark.parametrize(("key", "value"), LCKV_WRONG.values(), ids=LCKV_WRONG.keys())
def test_lckv_models_that_are_not_built_here(key: str, value: object) -> None:
    with pytest.raises(CheckpointError):
        from_config(lckv(**{"layer_types": "0s_2_2_3", key: value}))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "missing",
    [
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "initializer_range",
        "tie_word_embeddings",
        "rope_theta",
        "sliding_window",
        "hidden_act",
    ],
)
@pytest.mark.parametrize("null", [False, True])
def test_what_is_left_out_is_what_transformers_takes(kind: str, missing: str, null: bool) -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8}
    content = {**KINDS[kind], **wide}
    content.pop(missing, None)
    if null and missing in ("head_dim", "sliding_window"):
        content[missing] = None
    classes = {"llama": LlamaConfig, "mistral": MistralConfig}
    theirs = classes[kind].from_dict(content)
    mine = from_config(content)
    assert mine.model.query_groups == theirs.num_key_value_heads
    assert mine.model.head_dim == theirs.head_dim
    assert mine.model.norm_epsilon == theirs.rms_norm_eps
    assert mine.model.init_method_std == theirs.initializer_range
    assert mine.model.untie_embeddings_and_output_weights is not theirs.tie_word_embeddings
    assert mine.model.rotary_base == theirs.rope_parameters["rope_theta"]
    assert mine.window_size == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("missing", [key for key in KINDS["kvshare"] if key.startswith("iter_")])
def test_what_an_export_leaves_out_is_what_its_class_takes(missing: str) -> None:
    content = {key: value for key, value in KINDS["kvshare"].items() if key != missing}
    complete = {**content, missing: getattr(KVShareConfig.from_dict(content), missing)}
    assert from_config(content).identity == from_config(complete).identity
    content = {key: value for key, value in content.items() if key != "rms_norm_eps"}
    assert from_config(content).model.norm_epsilon == KVShareConfig.from_dict(content).rms_norm_eps


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 32}


def test_rotary_parameters_under_both_names() -> None:
    old = from_config({**LLAMA, "rope_scaling": SCALING, "rope_theta": 5e5})
    plain = {key: value for key, value in LLAMA.items() if key not in ("rope_scaling",)}
    new = from_config({**plain, "rope_parameters": {**SCALING, "rope_theta": 5e5}})
    assert old.identity == new.identity and old.model.use_rope_scaling
    assert LlamaConfig.from_dict({**plain, "rope_scaling": SCALING}).rope_parameters["factor"] == 8
    with pytest.raises(CheckpointError, match="rope_parameters says otherwise"):
        from_config({**plain, "rope_scaling": SCALING, "rope_parameters": {"rope_theta": 1e4}})


ODD: tuple[Any, ...] = (None, True, -1, 0, 3, 10**30, 0.5, float("nan"), float("inf"), "", "8")
ODD = (*ODD, "yarn", [], [0], [[0]], ["a"], {}, {"a": 1}, {"rope_type": ["x"]}, {"factor": None})


@pytest.mark.parametrize("kind", KINDS)
def test_odd_values_are_faults_not_accidents(kind: str) -> None:
    refused = 0
    for key in (*KINDS[kind], "rope_parameters", "layer_types", "rope_theta", "head_dim"):
        for value in ODD:
            content = {**KINDS[kind], key: value}
            try:
                from_config(content)
                doubts(content)
            except CheckpointError as error:
                refused += 1
                assert all(fault.fix for fault in error.faults)
    assert refused > 100


# The proof --------------------------------------------------------------------------------------


def test_the_proof_reaches_the_end_of_windows(single, tmp_path) -> None:
    """Windows wider than the tokens of the comparison hid where they are."""
    made = SharingMap(STANDARD.sources, (True, False, False, True))
    folder = write_folder(tmp_path / "hf", made, kv_window_size=4096)
    config = read_json(folder / "config.json")
    weights: TensorSource = HuggingFaceWeights(folder)
    right = from_config(config)
    wrong = replace(right, map=SharingMap(STANDARD.sources, (True, False, True, False)))
    assert same_logits(right, weights, folder, config, single).value < LOGIT_LIMIT
    with pytest.raises(CheckpointError, match="fp32 logits may differ by"):
        same_logits(wrong, weights, folder, config, single)


def test_mistral_reads_no_kinds_of_layers(single, tmp_path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    with pytest.raises(CheckpointError, match="transformers' Mistral does not read it"):
        from_config({**KINDS["mistral"], "sliding_window": 8, "layer_types": kinds})
    same = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}
    assert from_config({**KINDS["mistral"], **same}).map.windowed == (True,) * 4


def test_a_model_that_gets_a_map_is_proven_as_it_was_before(
    single, tmp_path, monkeypatch, capsys
) -> None:
    """The export of the result says nothing of what was read wrongly."""
    folder = write_folder(tmp_path / "hf", STANDARD)
    words = ["convert", "from-hf", "--hf", str(folder), "--kv-pattern", "cla:2", "--save"]
    assert main([*words, str(tmp_path / "right")]) == 0

    def misread(config):
        about = from_config(config)
        return replace(about, model=replace(about.model, rotary_base=3e4))

    monkeypatch.setattr(importing, "from_config", misread)
    assert main([*words, str(tmp_path / "wrong")]) == 2
    assert "fp32 logits may differ" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_what_is_told_is_printed(single, tmp_path, capsys) -> None:
    folder = write_folder(tmp_path / "hf", STANDARD, new_gate=1)
    assert main(["convert", "from-hf", "--hf", str(folder), "--save", str(tmp_path / "n")]) == 0
    assert "warning: config.json: new_gate: not known here" in capsys.readouterr().out


def test_what_transformers_cannot_load_is_told(single, tmp_path, capsys) -> None:
    folder = write_folder(tmp_path / "hf", STANDARD, bos_token_id="first")
    assert main(["convert", "from-hf", "--hf", str(folder), "--save", str(tmp_path / "n")]) == 2
    assert "transformers cannot load and run it" in capsys.readouterr().err
