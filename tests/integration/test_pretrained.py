"""A real pretrained Llama comes in, computes what it did, trains on three ranks, goes out again."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.pretrained import shape_flags
from megatron_kvshare import load_model
from megatron_kvshare.cli.main import main
from tests.integration.conftest import ROOT

pytestmark = [pytest.mark.nightly, pytest.mark.download]
LENGTH = 1000


@pytest.fixture(scope="module")
def pretrained() -> Path:
    folder = ROOT / "runs" / "pretrained"
    subprocess.run([sys.executable, "benchmarks/pretrained.py", str(folder)], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def native(pretrained, tmp_path_factory, single) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "native"
    assert main(["convert", "from-hf", "--hf", str(pretrained), "--save", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def real_text(pretrained) -> torch.Tensor:
    from transformers import AutoTokenizer

    (corpus,) = (ROOT / "examples" / "data").glob("*.jsonl.xz")
    text = json.loads(lzma.decompress(corpus.read_bytes()).splitlines()[-1])["text"]
    ids = AutoTokenizer.from_pretrained(pretrained)(text)["input_ids"]
    return torch.tensor([ids[:LENGTH]])


@torch.no_grad()
def test_it_computes_what_it_did(pretrained, native, real_text):
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    wanted = original(real_text).logits
    assert (load_model(native).logits(real_text) - wanted).abs().max() <= 1e-4
    assert wanted.argmax(-1)[:, :-1].eq(real_text[:, 1:]).float().mean() > 0.3, "it knows English"


def test_it_goes_out_bit_by_bit(pretrained, native, tmp_path):
    assert main(["convert", "to-hf", "--load", str(native), "--save", str(tmp_path / "hf")]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (pretrained, tmp_path / "hf"))
    before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_three_ranks_agree(native, pretrained, tmp_path):
    """Its heads do not cut in two: the first loss of a finetuning run on one and on three ranks."""
    words = shape_flags(pretrained)
    words += ["--load", str(native), "--finetune", "--mock-data"]
    words += ["--vocab-size", "49152", "--seq-length", "128", "--micro-batch-size", "1"]
    words += ["--global-batch-size", "1", "--train-iters", "1", "--eval-iters", "0"]
    losses = []
    for ranks in (1, 3):
        metrics = tmp_path / f"{ranks}.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), "-m", "megatron_kvshare", "pretrain", *words]
        command += ["--tensor-model-parallel-size", str(ranks), "--metrics-file", str(metrics)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=500)
        losses.append(json.loads(metrics.read_text().splitlines()[0])["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
