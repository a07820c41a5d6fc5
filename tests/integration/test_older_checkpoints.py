"""Checkpoints of format 4, which megatron-core wrote: `format_4.tar.xz` holds three, made by the
last version that wrote them on two data-parallel ranks, after three of six steps."""

from __future__ import annotations

import json
import shlex
import tarfile
from pathlib import Path

import pytest
import torch

from megatron_kvshare.checkpoint.parts import OPTIMIZER, UPDATES
from megatron_kvshare.checkpoint.tensors import NativeTensors
from tests.distributed.world import Layout, World
from tests.integration.pretrain_jobs import save_again_and_go_on

TWO = Layout(data=2)
MODEL = shlex.split(
    "--vocab-size 9 --num-layers 2 --hidden-size 8 --ffn-hidden-size 8 --num-attention-heads 2"
    " --num-query-groups 1 --seq-length 16 --kv-pattern standard --kv-layers 2 --eval-iters 0"
)
FLAGS = {
    "replicated": [],
    "distributed": ["--use-distributed-optimizer"],
    "replicated-bf16": ["--bf16"],
}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("format_4")
    with tarfile.open(Path(__file__).with_name("format_4.tar.xz")) as packed:
        packed.extractall(root, filter="data")
    return root


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    stored = NativeTensors(folder / "iter_0000003")
    return {name: stored.read(name) for name in stored.tensors if "random_state" not in name}


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What format 6 has of it: fp32 weights once, under one name."""
    copies = f"{OPTIMIZER}state.param."
    if any(name.startswith(copies) for name in state):
        assert all(torch.equal(state[n], state[copies + n]) for n in state if "optim" not in n)
    return {name: tensor for name, tensor in state.items() if not name.startswith(copies)}


@pytest.mark.parametrize("kind", FLAGS)
def test_it_goes_on(world: World, old: Path, tmp_path: Path, kind: str) -> None:
    """fp32: the loss the old version had; every tensor to the bit, whatever the precision."""
    words = [*MODEL, *FLAGS[kind], "--load", str(old / kind), "--save", str(tmp_path)]
    records, _ = world.run(save_again_and_go_on, TWO, words)
    lines = map(json.loads, (old / f"{kind}.jsonl").read_text().splitlines())
    expected = {line["step"]: line["loss"] for line in lines if line["step"] > 3}
    found = {record["step"]: record["loss"] for record in records}
    assert found == pytest.approx(expected, rel=1e-2 if "bf16" in kind else 1e-6)
    before, after = renamed(read_all(old / kind)), read_all(tmp_path)
    assert after.pop(UPDATES).item() == 3
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_another_optimizer_and_layout(world: World, old: Path, tmp_path: Path) -> None:
    words = [*MODEL, "--load", str(old / "distributed"), "--save", str(tmp_path)]
    world.run(save_again_and_go_on, Layout(tensor=2), words)
    before, after = renamed(read_all(old / "distributed")), read_all(tmp_path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
