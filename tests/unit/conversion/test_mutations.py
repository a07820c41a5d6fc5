"""Damaged config.json and index of a Hugging Face folder: refused, or read as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_kvshare.checkpoint.reader import whole_model
from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM
from megatron_kvshare.conversion.folder import CONFIG, INDEX, HuggingFaceWeights
from megatron_kvshare.conversion.importing import open_folder
from megatron_kvshare.conversion.verify import same_logits
from megatron_kvshare.errors import CheckpointError, KVShareError
from megatron_kvshare.evaluation.api import LoadedModel
from megatron_kvshare.serving.load import Opened
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import write_folder
from tests.mutations import mutations, text_mutations
from tests.product import random_tokens

COUNTS = [100, pytest.param(2000, marks=pytest.mark.nightly)]
MAPS = {"llama": build_map(2, "standard"), "shared": build_map(4, "sandwich-top", 2)}
TOKENS = random_tokens(40, 2, 9, seed=0)


def changed_texts(path: Path, count: int):
    """Half of the changes are damage to bytes, half are edits of the text."""
    original = path.read_bytes()
    for what, content in mutations(original, count // 2, seed=count):
        path.write_bytes(content)
        yield what
    for what, text in text_mutations(original.decode(), count // 2, seed=count):
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        yield what


@pytest.mark.parametrize("count", COUNTS)
def test_index(tmp_path: Path, count: int) -> None:
    """Every tensor is the one that was written, whatever the index says."""
    hf = write_folder(tmp_path / "hf", MAPS["llama"], max_shard_bytes=20_000)
    written = HuggingFaceWeights(hf)
    wanted = {name: written.read(name) for name in written.tensors}
    assert len(list(hf.glob("*.safetensors"))) > 2
    refused = 0
    for what in changed_texts(hf / INDEX, count):
        try:
            found = HuggingFaceWeights(hf)
        except KVShareError:
            refused += 1
            continue
        assert found.tensors.keys() == wanted.keys(), what
        assert all(torch.equal(found.read(name), wanted[name]) for name in wanted), what
    assert refused > count / 3


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", MAPS)
def test_config(tmp_path: Path, single, name: str, count: int) -> None:
    """What is accepted computes what transformers computes of the same folder; where that cannot
    load it, the proof of an import refuses it."""
    hf = write_folder(tmp_path / "hf", MAPS[name], architectures=["LlamaForCausalLM"])
    accepted = 0
    for what in changed_texts(hf / CONFIG, count):
        try:
            found = open_folder(hf)
        except KVShareError:
            continue
        try:
            wanted = theirs(hf, name)
        except Exception:
            with pytest.raises(CheckpointError, match="transformers cannot load and run it"):
                same_logits(found.spec, found.weights, hf, found.config, single)
            continue
        accepted += 1
        model = whole_model(found.spec, found.weights, single)
        opened = Opened(found.spec, found.weights, tokenizer=None)
        mine = LoadedModel(model, opened, single).logits(TOKENS)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4, msg=what)
    assert 0 < accepted < count


def theirs(hf: Path, name: str) -> torch.Tensor:
    """Logits of the folder as transformers loads it; of a shared map with the exported code."""
    if name == "llama":
        model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    else:
        config = KVShareConfig.from_pretrained(hf)
        model = KVShareForCausalLM.from_pretrained(hf, config=config, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(TOKENS).logits
