"""Which files of a folder its weights are: those that transformers takes, and all of an index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion.folder import INDEX, SINGLE, HuggingFaceWeights, read_json
from megatron_kvshare.conversion.importing import open_folder
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import write_folder

NORM = "model.norm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in two shards."""
    folder = tmp_path_factory.mktemp("index") / "hf"
    write_folder(folder, build_map(2, "standard"), max_shard_bytes=40_000)
    assert (folder / SECOND).is_file() and len(list(folder.glob("*.safetensors"))) == 2
    return folder


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "hf")
    return tmp_path / "hf"


def weight_map(folder: Path) -> dict[str, str]:
    return read_json(folder / INDEX)["weight_map"]


def rewrite(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": content}))


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*-of-*") for name, x in load_file(path).items()}


def test_a_single_file_comes_before_an_index(hf: Path, single, tmp_path, capsys) -> None:
    """As after save_pretrained of a smaller model into the folder of a sharded one."""
    newer = {name: x + 1 for name, x in merged(hf).items()}
    save_file(newer, hf / SINGLE, metadata={"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).state_dict()
    mine = HuggingFaceWeights(hf)
    assert mine.unread == tuple(sorted([FIRST, SECOND, INDEX]))
    for name in mine.tensors:
        assert torch.equal(mine.read(name), newer[name])
        assert torch.equal(theirs[name], newer[name])
    assert any(f"{INDEX} is not read" in line for line in open_folder(hf).doubts)
    assert main(["convert", "from-hf", "--hf", str(hf), "--save", str(tmp_path / "n")]) == 0
    assert f"{INDEX} is not read" in capsys.readouterr().out


def test_pickled_weights_beside_safetensors_are_no_matter(hf: Path) -> None:
    (hf / "pytorch_model.bin").write_bytes(b"anything")
    (hf / "pytorch_model.bin.index.json").write_text("{}")
    assert HuggingFaceWeights(hf).tensors.keys() == weight_map(hf).keys()
    assert HuggingFaceWeights(hf).unread == ()


def test_the_cache_of_the_hub_is_made_of_links(hf: Path) -> None:
    blobs = hf.parent / "blobs"
    blobs.mkdir()
    for name in (FIRST, SECOND):
        (hf / name).rename(blobs / name[:11])
        (hf / name).symlink_to(Path("..") / "blobs" / name[:11])
    weights = HuggingFaceWeights(hf)
    assert weights.read(NORM).shape == (32,)


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def of_ranks(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "shard-00001-model-00001-of-00002.safetensors")


def in_two(folder: Path) -> None:
    second = load_file(folder / SECOND)
    name = next(iter(load_file(folder / FIRST)))
    save_file({**second, name: torch.ones(2)}, folder / SECOND, metadata={"format": "pt"})


def unlisted(folder: Path) -> None:
    save_file({**load_file(folder / SECOND), "extra": torch.ones(2)}, folder / SECOND)


def listed(**changes: object) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, {**weight_map(folder), **changes})


def named_norm(shard: object) -> Callable[[Path], None]:
    return listed(**{NORM: shard})


def twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(f'"{NORM}"', f'"{NORM}": "{FIRST}", "{NORM}"'))


def elsewhere(folder: Path) -> None:
    """The shard is beside the folder, under a path that leads there."""
    shutil.copy(folder / SECOND, folder.parent / SECOND)
    content = {name: f"../{x}" if x == SECOND else x for name, x in weight_map(folder).items()}
    rewrite(folder, content)


def absolute(folder: Path) -> None:
    content = {name: str(folder / shard) for name, shard in weight_map(folder).items()}
    rewrite(folder, content)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "an adapter": (adapter, "merge_and_unload"),
    "files of ranks": (of_ranks, "of several ranks"),
    "a tensor in two shards": (in_two, "is in model-00001-of-00002.safetensors too"),
    "a tensor the index does not know": (unlisted, "the index not"),
    "a tensor nobody has": (listed(extra=FIRST), "extra = 'model-00001-of-00002.safetensors'"),
    "in the other shard": (named_norm(FIRST), f"{NORM} = '{FIRST}'"),
    "a key twice": (twice, f"the key {NORM} is there twice"),
    "a shard beside the folder": (elsewhere, "of this folder"),
    "an absolute path": (absolute, "of this folder"),
    "a path down and up": (named_norm(f"x/../{SECOND}"), "of this folder"),
    "a path of Windows": (named_norm(f"..\\{SECOND}"), "of this folder"),
    "NUL": (named_norm("x\0.safetensors"), "of this folder"),
    "a pickle": (named_norm("pytorch_model.bin"), "of this folder"),
    "a number": (named_norm(3), "of this folder"),
    "null": (named_norm(None), "of this folder"),
    "a list": (lambda folder: rewrite(folder, list(weight_map(folder))), "hold a weight_map"),
    "a shard that is missing": (named_norm("model-00003.safetensors"), "weights are missing"),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(change: Callable[[Path], None], says: str, hf: Path) -> None:
    change(hf)
    with pytest.raises(CheckpointError) as raised:
        open_folder(hf)
    assert says in str(raised.value)


def test_all_tensors_are_named(hf: Path) -> None:
    content = weight_map(hf)
    swapped = {name: FIRST if shard == SECOND else SECOND for name, shard in content.items()}
    rewrite(hf, swapped)
    with pytest.raises(CheckpointError) as raised:
        HuggingFaceWeights(hf)
    assert len(raised.value.faults) == 9
    assert f"{len(content) - 8} more tensors" in str(raised.value)


def test_a_key_twice_in_config_json(hf: Path) -> None:
    text = (hf / "config.json").read_text()
    (hf / "config.json").write_text(text.replace("{", '{"hidden_size": 64,', 1))
    with pytest.raises(CheckpointError, match="the key hidden_size is there twice"):
        open_folder(hf)
