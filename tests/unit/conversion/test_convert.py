"""From a Hugging Face folder to a native checkpoint and back: nothing changes on the way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion.folder import HuggingFaceWeights
from megatron_kvshare.conversion.settings import from_config, to_config
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import TINY, code_copied_to, model_spec, write_folder
from tests.maps import named_maps, random_maps
from tests.recipes import strided

MAPS = {**named_maps(8), **random_maps(8, 4)}
TOP = build_map(8, "sandwich-top", 3)
STANDARD = build_map(8, "standard")
SCALED = TINY.but(
    untied=True,
    extra={"use_rope_scaling": True, "rotary_base": 5e5, "kv_channels": 16, "norm_epsilon": 1e-6},
)
STRETCHED = {
    kind: TINY.but(extra={"rope_scaling_type": kind, "rope_scaling_factor": 2.0, **more})
    for kind, more in {
        "linear": {},
        "dynamic": {"max_position_embeddings": 64},
        "yarn": {"rope_original_max_positions": 16, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.3},
    }.items()
}


def convert(direction: str, *arguments: object) -> int:
    return main(["convert", direction, *map(str, arguments)])


@pytest.mark.parametrize("sharing", MAPS.values(), ids=MAPS.keys())
def test_config_json_says_everything(sharing):
    for recipe in (*RECIPES.values(), strided(3, 1, 2, "self", p=True)):
        for tiny in (TINY, SCALED, *STRETCHED.values()):
            about = model_spec(sharing, recipe, tiny)
            content = json.loads(json.dumps(to_config(about, torch.float32, {})))
            assert from_config(content).identity == about.identity


KINDS = {
    "standard": (STANDARD, TINY, torch.float32),
    "top": (TOP, TINY, torch.float32),
    "windowed": (MAPS["mixattention"], TINY, torch.float32),
    "several": (MAPS["random.1"], TINY, torch.float32),
    "bf16": (TOP, TINY, torch.bfloat16),
    "scaled": (TOP, SCALED, torch.float32),
    "scaled-standard": (STANDARD, SCALED, torch.float32),
    "linear": (TOP, STRETCHED["linear"], torch.float32),
    "dynamic-standard": (STANDARD, STRETCHED["dynamic"], torch.float32),
    "yarn": (TOP, STRETCHED["yarn"], torch.float32),
}


@pytest.mark.parametrize(("sharing", "tiny", "dtype"), KINDS.values(), ids=KINDS.keys())
def test_there_and_back_again(sharing, tiny, dtype, single, tmp_path, capsys):
    start = write_folder(tmp_path / "a", sharing, RECIPES["two-sweep"], tiny, 40_000, dtype)
    assert len(list(start.glob("*.safetensors"))) > 1
    assert convert("from-hf", "--hf", start, "--save", tmp_path / "native") == 0
    arguments = ("--load", tmp_path / "native", "--save", tmp_path / "b", "--max-shard-gb", 0.00004)
    assert convert("to-hf", *arguments) == 0
    assert "equal bit by bit" in capsys.readouterr().err
    for shard in start.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    index = "model.safetensors.index.json"
    assert (start / index).read_bytes() == (tmp_path / "b" / index).read_bytes()
    before, after = (json.loads((f / "config.json").read_text()) for f in (start, tmp_path / "b"))
    assert before == after


def test_transformers_loads_an_export_by_its_own_code(single, tmp_path):
    folder = write_folder(tmp_path / "hf", TOP, RECIPES["one-sweep"])
    with code_copied_to(tmp_path / "m"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert (config.iter_stride, config.iter_start) == (4, "input")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules")
        out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
        assert out.shape == (1, 6)
        model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    start = HuggingFaceWeights(folder)
    assert again.keys() == start.tensors.keys()
    assert all(torch.equal(again[name], start.read(name)) for name in again)


def test_a_standard_export_is_a_plain_llama(single, tmp_path):
    write_folder(tmp_path / "a", STANDARD)
    convert("from-hf", "--hf", tmp_path / "a", "--save", tmp_path / "n")
    convert("to-hf", "--load", tmp_path / "n", "--save", tmp_path / "b")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert not list((tmp_path / "b").glob("*.py"))


def test_a_native_checkpoint_says_where_to_go_on(single, tmp_path, capsys):
    write_folder(tmp_path / "a", TOP)
    assert convert("from-hf", "--hf", tmp_path / "a", "--save", tmp_path / "n") == 0
    printed = capsys.readouterr()
    assert "--finetune" in printed.out
    assert "has no tokenizer.json" in printed.out
    assert (tmp_path / "n" / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    assert not list(tmp_path.glob("*.partial"))


def test_mistral_windows(single, tmp_path):
    """All layers have the window; transformers' own Mistral is what the import is compared with."""
    windowed = SharingMap(STANDARD.sources, (True,) * 8)
    write_folder(tmp_path / "kv", windowed)
    folder = write_folder(tmp_path / "a", STANDARD, model_type="mistral", sliding_window=4)
    assert convert("from-hf", "--hf", folder, "--save", tmp_path / "n") == 0
    assert main(["verify", "--load", str(tmp_path / "n"), "--hf", str(folder)]) == 0
    assert main(["verify", "--load", str(tmp_path / "n"), "--hf", str(tmp_path / "kv")]) == 0


def test_published_lckv_checkpoints(single, tmp_path, capsys):
    """Their map is a string in layer_types, and no code for them is run."""
    plain = {key: None for key in ("auto_map", "kv_source_layers", "iter_stride", "iter_start")}
    settings = {
        **plain,
        "model_type": "lckv-llama",
        "layer_types": "0_6_6_6_6s_6_6_7",
        "forward_passes": 3,
        "backward_passes": 2,
        "sliding_window": 4,
    }
    sharing = SharingMap.parse("0_6_6_6_6s_6_6_7")
    folder = write_folder(tmp_path / "a", sharing, **settings)
    assert convert("from-hf", "--hf", folder, "--save", tmp_path / "n") == 0
    convert("to-hf", "--load", tmp_path / "n", "--save", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["kv_source_layers"] == list(sharing.sources)
    assert (config["kv_windowed_layers"], config["kv_window_size"]) == ([4], 4)
    assert (config["iter_forward_passes"], config["iter_backward_passes"]) == (3, 2)


@pytest.mark.parametrize("init", ["mean", "target", "aligned", "random"])
def test_a_standard_model_becomes_a_shared_one(init, single, tmp_path):
    folder = write_folder(tmp_path / "a", STANDARD)
    arguments = ("--kv-pattern", "sandwich-middle", "--kv-layers", 4, "--kv-init", init)
    assert convert("from-hf", "--hf", folder, "--save", tmp_path / "n", *arguments) == 0
    assert convert("to-hf", "--load", tmp_path / "n", "--save", tmp_path / "b") == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["kv_source_layers"] == list(build_map(8, "sandwich-middle", 4).sources)


def test_fp16_is_widened_to_fp32(single, tmp_path):
    folder = write_folder(tmp_path / "a", TOP, dtype=torch.float16)
    assert convert("from-hf", "--hf", folder, "--save", tmp_path / "n") == 0
    assert convert("to-hf", "--load", tmp_path / "n", "--save", tmp_path / "b") == 0
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("a", "b"))
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_files_of_an_export(single, tmp_path):
    write_folder(tmp_path / "a", TOP)
    convert("from-hf", "--hf", tmp_path / "a", "--save", tmp_path / "n")
    convert("to-hf", "--load", tmp_path / "n", "--save", tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "configuration_kvshare.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_kvshare.py",
    }
    card = (tmp_path / "b" / "README.md").read_text()
    assert "upward" in card and "trust_remote_code=True" in card and TOP.notation in card
