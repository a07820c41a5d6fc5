"""Checkpoints of format 4, which megatron-core wrote, go on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from megatron_kvshare.checkpoint.parts import OPTIMIZER, UPDATES
from megatron_kvshare.checkpoint.tensors import NativeTensors
from tests.distributed.world import Layout, World
from tests.integration.pretrain_jobs import save_again_and_go_on

TWO = Layout(data=2)
SMALLEST = shlex.split(
    "--vocab-size 9 --num-layers 2 --hidden-size 8 --ffn-hidden-size 8 --num-attention-heads 2"
    " --num-query-groups 1 --seq-length 16 --kv-pattern standard --kv-layers 2 --eval-iters 0"
)
"""The model in them."""
FLAGS = {
    "replicated": [],
    "distributed": ["--use-distributed-optimizer"],
    "replicated-bf16": ["--bf16"],
}


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
def test_it_goes_on(world: World, format_4: Path, tmp_path: Path, kind: str) -> None:
    """fp32: the loss the old version had; every tensor to the bit, whatever the precision."""
    words = [*SMALLEST, *FLAGS[kind], "--load", str(format_4 / kind), "--save", str(tmp_path)]
    records, _ = world.run(save_again_and_go_on, TWO, words)
    lines = map(json.loads, (format_4 / f"{kind}.jsonl").read_text().splitlines())
    expected = {line["step"]: line["loss"] for line in lines if line["step"] > 3}
    found = {record["step"]: record["loss"] for record in records}
    assert found == pytest.approx(expected, rel=1e-2 if "bf16" in kind else 1e-6)
    before, after = renamed(read_all(format_4 / kind)), read_all(tmp_path)
    assert after.pop(UPDATES).item() == 3
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_another_optimizer_and_layout(world: World, format_4: Path, tmp_path: Path) -> None:
    words = [*SMALLEST, "--load", str(format_4 / "distributed"), "--save", str(tmp_path)]
    world.run(save_again_and_go_on, Layout(tensor=2), words)
    before, after = renamed(read_all(format_4 / "distributed")), read_all(tmp_path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
