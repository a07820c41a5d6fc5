"""What can be wrong with a folder or a checkpoint: each is one clear message, and nothing that
looks finished is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_kvshare.checkpoint.integrity import mark
from megatron_kvshare.checkpoint.manifest import read_manifest
from megatron_kvshare.cli.main import main
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import write_folder

TOP = build_map(8, "sandwich-top", 3)
STANDARD = build_map(8, "standard")
Change = Callable[[Path], object]


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    """A folder of each kind, sharded ones, and a native checkpoint."""
    root = tmp_path_factory.mktemp("originals")
    write_folder(root / "kvshare", TOP, RECIPES["two-sweep"])
    write_folder(root / "sharded", TOP, RECIPES["two-sweep"], max_shard_bytes=40_000)
    write_folder(root / "llama", STANDARD)
    made = main(
        ["convert", "from-hf", "--hf", str(root / "kvshare"), "--save", str(root / "native")]
    )
    assert made == 0
    return root


def config(**changes: object) -> Change:
    """Settings changed; ``...`` takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content.update(changes)
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        edit(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def index(edit: Callable[[dict], object]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str, size: int) -> Change:
    return lambda folder: os.truncate(next(folder.rglob(name)), size)


def remove(name: str) -> Change:
    return lambda folder: next(folder.rglob(name)).unlink()


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def big_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"word{i}": i for i in range(60)}
    Tokenizer(models.WordLevel(words, "word0")).save(str(folder / "tokenizer.json"))


LAST = "model.layers.7.self_attn.q_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
FOLDERS: dict[str, tuple[str, Change, str]] = {
    "no folder": ("llama", shutil.rmtree, "config.json = 'missing'"),
    "no config": ("llama", remove("config.json"), "the folder has no such file"),
    "config is no JSON": ("llama", text("config.json", "{"), "no readable JSON"),
    "config is a list": ("llama", text("config.json", "[1]"), "it must hold an object"),
    "unknown architecture": ("llama", config(model_type="gpt2"), "only kvshare, llama, mistral"),
    "no architecture": ("llama", config(model_type=...), "only kvshare, llama, mistral"),
    "quantised": ("llama", config(quantization_config={"bits": 4}), "quantised"),
    "biases": ("llama", config(attention_bias=True), "built with False only"),
    "another activation": ("llama", config(hidden_act="gelu"), "built with 'silu' only"),
    "half of yarn": ("llama", config(rope_scaling={"rope_type": "yarn"}), "missing: ['factor']"),
    "yarn of nothing": (
        "llama",
        config(rope_theta=1, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "rope_theta must be above 1",
    ),
    "yarn with a text": (
        "kvshare",
        config(rope_parameters={"rope_theta": 1e4, "rope_type": "yarn", "factor": "4"}),
        "factor must be a number above 0, not '4'",
    ),
    "yarn with two lengths": (
        "llama",
        config(
            original_max_position_embeddings=8,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 16,
            },
        ),
        "original_max_position_embeddings = 8: rope_scaling says otherwise: 16",
    ),
    "linear without a factor": (
        "llama",
        config(rope_scaling={"type": "linear"}),
        "rope_type 'linear' is incomplete",
    ),
    "a rotary embedding of its own": (
        "llama",
        config(rope_scaling={"rope_type": "longrope", "factor": 2.0}),
        "rope_type 'longrope' is not one of default, llama3, linear, dynamic, yarn",
    ),
    "half of llama3": ("kvshare", config(rope_parameters=LLAMA3), "low_freq_factor"),
    "part of a head rotated": (
        "kvshare",
        config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "rotated whole",
    ),
    "no vocabulary": ("llama", config(vocab_size=...), "vocab_size = None"),
    "layers as text": ("llama", config(num_hidden_layers="8"), "whole number"),
    "no layers": ("llama", config(num_hidden_layers=0), "whole number above 0"),
    "kv heads do not divide": ("llama", config(num_key_value_heads=3), "must divide"),
    "a negative epsilon": (
        "llama",
        config(rms_norm_eps=-1.0),
        "rms_norm_eps = -1.0: it must be a number above 0",
    ),
    "map of another depth": ("kvshare", config(kv_source_layers=[0, 1]), "has 8"),
    "no map": ("kvshare", config(kv_source_layers=[]), "at least one layer"),
    "map reads a consumer": (
        "kvshare",
        config(kv_source_layers=[0, 2, 3, 3] + [4] * 4),
        "KV layer",
    ),
    "map reads above the top": ("kvshare", config(kv_source_layers=[0, 9] + [2] * 6), "0 to 7"),
    "a stride of nothing": ("kvshare", config(iter_stride=0), "token subsets"),
    "no passes": ("kvshare", config(iter_backward_passes=0), "kv-backward-sweeps"),
    "unknown start": ("kvshare", config(iter_start="middle"), "middle"),
    "windows without width": ("kvshare", config(kv_windowed_layers=[1]), "kv_window_size"),
    "one shard missing": ("sharded", remove("model-00002-*"), "weights are missing"),
    "no weights": ("llama", remove("model.safetensors"), "weights are missing"),
    "truncated shard": ("sharded", cut("model-00002-*", 900), "no complete safetensors file"),
    "truncated header": ("llama", cut("model.safetensors", 5), "no complete safetensors file"),
    "garbage": ("llama", text("model.safetensors", "x" * 999), "no complete safetensors file"),
    "pickled weights": ("llama", pickled_only, "which can run code"),
    "index of other shards": (
        "sharded",
        index(lambda content: content["weight_map"].update({Q: content["weight_map"][LAST]})),
        "not where it says",
    ),
    "index without a map": ("sharded", index(dict.clear), "weight_map"),
    "tensor missing": ("llama", tensors(lambda content: content.pop(Q)), "it is missing"),
    "one too many": (
        "llama",
        tensors(lambda content: content.update({"model.extra": torch.ones(2)})),
        "no such tensor",
    ),
    "keys of a consumer": (
        "kvshare",
        tensors(
            lambda c: c.update({Q.replace("0.", "1.").replace("q_", "k_"): torch.ones(16, 32)})
        ),
        "no such tensor",
    ),
    "wrong shape": (
        "llama",
        tensors(lambda content: content.update({Q: torch.ones(8, 32)})),
        "has the shape (32, 32)",
    ),
    "all of another width": ("llama", config(hidden_size=64), "more tensors do not fit"),
    "whole numbers": (
        "llama",
        tensors(lambda content: content.update({Q: torch.ones(32, 32, dtype=torch.int8)})),
        "has the type I8",
    ),
    "head not tied": (
        "llama",
        tensors(lambda content: content.update({"lm_head.weight": torch.ones(40, 32)})),
        "tie_word_embeddings to false",
    ),
    "tokenizer too large": ("llama", big_tokenizer, "it has 60 ids, the embedding 40"),
    "broken tokenizer": ("llama", text("tokenizer.json", "{}"), "not a Hugging Face tokenizer"),
}


def one_message(capsys) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count(" error: ") == 1, error
    assert "Fix: " in error
    return error


@pytest.mark.parametrize(("kind", "change", "says"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folders(kind, change, says, originals, tmp_path, capsys, single):
    shutil.copytree(originals / kind, tmp_path / "hf")
    change(tmp_path / "hf")
    code = main(["convert", "from-hf", "--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "n")])
    assert code == 2
    assert says in one_message(capsys)
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


class Around:
    """getattr is needed for enums; it must lead to nothing else."""

    def __reduce__(self):
        return getattr, (TensorStorageMetadata, "__init__")


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


def attacked(by: type) -> Change:
    """An attacker marks what he has written."""

    def change(root: Path) -> None:
        path = next(root.rglob(".metadata"))
        path.write_bytes(pickle.dumps(by()))
        manifest = read_manifest(path.parent)
        marks = {name: mark(path.parent / name) for name in manifest.files}
        replace(manifest, files=marks).write(path.parent)

    return change


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "nothing there": (shutil.rmtree, "there is no checkpoint"),
    "no manifest": (remove("kvshare.json"), "not a complete checkpoint"),
    "damaged manifest": (cut("kvshare.json", 100), "not a complete checkpoint"),
    "no list of tensors": (remove(".metadata"), ".metadata cannot be read"),
    "truncated list": (cut(".metadata", 500), ".metadata has 500 bytes"),
    "a list that runs code": (attacked(Attack), "no description of data"),
    "a list that reaches around": (attacked(Around), "something else in place of Metadata"),
    "truncated weights": (cut("__0_0.distcp", 20_000), "__0_0.distcp has 20,000 bytes"),
    "no weights": (remove("__0_0.distcp"), "__0_0.distcp cannot be read"),
}


@pytest.mark.parametrize(("change", "says"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoints(change, says, originals, tmp_path, capsys, single, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(originals / "native", tmp_path / "n")
    change(tmp_path / "n")
    assert main(["convert", "to-hf", "--load", "n", "--save", "hf"]) == 2
    assert says in one_message(capsys)
    assert {path.name for path in tmp_path.iterdir()} <= {"n"}


def test_a_folder_in_the_way(originals, tmp_path, capsys, single):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("precious")
    code = main(
        ["convert", "to-hf", "--load", str(originals / "native"), "--save", str(tmp_path / "hf")]
    )
    assert code == 2
    assert "there is something already" in one_message(capsys)
    assert (tmp_path / "hf" / "mine").read_text() == "precious"


def test_a_model_that_shares_already(originals, tmp_path, capsys, single):
    arguments = ["--hf", str(originals / "kvshare"), "--save", str(tmp_path / "n")]
    assert main(["convert", "from-hf", *arguments, "--kv-pattern", "cla:2"]) == 2
    assert "without sharing" in one_message(capsys)


def test_an_unknown_pattern(originals, tmp_path, capsys, single):
    arguments = ["--hf", str(originals / "llama"), "--save", str(tmp_path / "n")]
    assert main(["convert", "from-hf", *arguments, "--kv-pattern", "burger-top"]) == 2
    assert "burger-top" in one_message(capsys)


def test_a_recipe_without_a_map(originals, tmp_path, capsys, single):
    arguments = ["--hf", str(originals / "kvshare"), "--save", str(tmp_path / "n")]
    assert main(["convert", "from-hf", *arguments, "--kv-recipe", "paper"]) == 2
    assert "give --kv-pattern or --kv-map too" in one_message(capsys)


VERIFY: dict[str, tuple[Change, str]] = {
    "one bit": (
        tensors(lambda c: c[Q].view(torch.int32)[0, 0].bitwise_xor_(1)),
        "1 tensors are not those of the checkpoint",
    ),
    "another recipe": (config(iter_stride=2), "kv_recipe"),
    "another map": (config(kv_source_layers=[0, 1, *[2] * 6]), "kv_map"),
    "other code": (text("modeling_kvshare.py", "import os"), "not the file this version exports"),
    "no code": (remove("modeling_kvshare.py"), "not the file this version exports"),
}


@pytest.mark.parametrize(("change", "says"), VERIFY.values(), ids=VERIFY.keys())
def test_verify_sees_a_difference(change, says, originals, tmp_path, capsys, single):
    shutil.copytree(originals / "kvshare", tmp_path / "hf")
    arguments = ["verify", "--load", str(originals / "native"), "--hf", str(tmp_path / "hf")]
    assert main(arguments) == 0
    capsys.readouterr()
    change(tmp_path / "hf")
    assert main(arguments) == 2
    assert says in one_message(capsys)
