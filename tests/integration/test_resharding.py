"""A checkpoint of any layout and optimizer goes on with any other: state by the bit, and losses.

A run is saved after three of six steps. Another one loads it, saves it again at once (the second
checkpoint must hold what the first holds) and trains the other three.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_kvshare.checkpoint.folder import iteration_folder
from megatron_kvshare.checkpoint.manifest import read_manifest
from megatron_kvshare.checkpoint.parts import OPTIMIZER, RANDOM_STATE, UPDATES
from megatron_kvshare.checkpoint.tensors import NativeTensors, stored_tensors
from tests.distributed.world import Layout, World
from tests.integration.pretrain_jobs import (
    MAPS,
    losses,
    run_pretrain,
    save_again_and_go_on,
    set_latest,
)
from tests.zero import file_of

VOCABULARY = ["--vocab-size", "101"]
"""Odd: padded otherwise on every layout."""


class Side(NamedTuple):
    """How a run is laid out; `distributed`: with the distributed optimizer; `zero`: by DeepSpeed,
    this stage of it."""

    layout: Layout = Layout()
    distributed: bool = False
    bf16: bool = False
    zero: int | None = None

    @property
    def flags(self) -> list[str]:
        flags = ["--use-distributed-optimizer"] if self.distributed else []
        if self.zero is not None:
            file = file_of(self.zero)
            flags += ["--deepspeed", "--zero-stage", str(self.zero)]
            flags += [] if file is None else ["--deepspeed_config", file]
        return flags + (["--bf16"] if self.bf16 else [])

    def __str__(self) -> str:
        zero = "" if self.zero is None else f"-zero{self.zero}"
        return f"{self.layout}{'-distributed' * self.distributed}{zero}{'-bf16' * self.bf16}"


class Saved(NamedTuple):
    """A run's checkpoints and what it logged."""

    folder: Path
    losses: dict[int, float]


Source = Callable[[str, Side], Saved]


@pytest.fixture(scope="module")
def source(world: World, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Runs of six steps, each made when it is first asked for."""
    made: dict[tuple[str, Side], Saved] = {}

    def get(name: str, side: Side) -> Saved:
        if (name, side) not in made:
            made[name, side] = saved_run(world, name, side, tmp_path_factory.mktemp("source"))
        return made[name, side]

    return get


def saved_run(world: World, name: str, side: Side, root: Path) -> Saved:
    """Six steps, of which the third's checkpoint is the one to continue from."""
    words = [*MAPS[name], *VOCABULARY, *side.flags, "--save", str(root)]
    words += ["--save-interval", "3", "--metrics-file", str(root / "m.jsonl")]
    world.run(run_pretrain, side.layout, words)
    set_latest(root, 3)
    return Saved(root, losses(root / "m.jsonl"))


def go_on(world: World, found: Saved, name: str, side: Side, folder: Path) -> Saved:
    """Load, save again to `folder`, train on."""
    words = [*MAPS[name], *VOCABULARY, *side.flags, "--load", str(found.folder)]
    logs = world.run(save_again_and_go_on, side.layout, [*words, "--save", str(folder)])
    lines = next(log for log in logs if log)
    return Saved(folder, {line["step"]: line["loss"] for line in lines if "loss" in line})


def state_of(folder: Path, step: int = 3) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds but the random state, which belongs to ranks."""
    inside = iteration_folder(folder, step)
    # Of DeepSpeed's layout the count of updates is apart.
    sources = (NativeTensors(inside), stored_tensors(inside, read_manifest(inside)))
    return {
        name: source.read(name)
        for source in sources
        for name in source.tensors
        if not name.startswith(RANDOM_STATE)
    }


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not same_bits(tensor, second[name])]
    assert not different


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


ONE, DP2 = Side(), Side(Layout(data=2), distributed=True)
ZERO2, ZERO3 = (Side(Layout(data=2), zero=stage) for stage in (2, 3))
TP2_PP2 = Layout(tensor=2, pipeline=2)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("standard", Side(Layout(pipeline=2), distributed=True)),
        ("bottom", DP2),
        ("cyclic", DP2),
        ("cyclic", ZERO2),
    ],
    ids=str,
)
def test_a_resume_on_the_same_layout_is_bit_identical(
    world: World, source: Source, tmp_path: Path, name: str, side: Side
) -> None:
    found = source(name, side)
    again = go_on(world, found, name, side, tmp_path)
    assert again.losses == {step: found.losses[step] for step in (4, 5, 6)}
    assert_equal(state_of(found.folder), state_of(tmp_path))
    # Training went on in between: the last states are equal too.
    assert_equal(state_of(found.folder, 6), state_of(tmp_path, 6))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DP2, ONE),
        (Side(TP2_PP2), Side(Layout(data=4), distributed=True)),
        (DP2, Side(Layout(pipeline=2, virtual=2))),
        (ZERO2, Side(Layout(data=4), zero=3)),
        (ZERO3, ONE),
        (DP2, Side(Layout(tensor=2, data=2, sequence_parallel=True), zero=1)),
    ],
    ids=str,
)
def test_a_resume_on_another_layout(
    world: World, source: Source, tmp_path: Path, before: Side, after: Side
) -> None:
    check_other_layout(world, source, tmp_path, before, after)


def check_other_layout(
    world: World, source: Source, folder: Path, before: Side, after: Side
) -> None:
    found = source("cyclic", before)
    again = go_on(world, found, "cyclic", after, folder)
    expected = {step: found.losses[step] for step in (4, 5, 6)}
    assert again.losses == pytest.approx(expected, rel=1e-5)
    state = state_of(found.folder)
    assert len([name for name in state if name.startswith(OPTIMIZER)]) > 50
    assert state[UPDATES].item() == 3
    assert_equal(state, state_of(folder))


LAYOUTS = [
    Layout(),
    Layout(data=2),
    Layout(data=4),
    Layout(tensor=2),
    Layout(tensor=2, data=2, sequence_parallel=True),
    Layout(tensor=4),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2),
    Layout(pipeline=2, data=2),
    TP2_PP2,
]
SIDES = [Side(layout, distributed) for layout in LAYOUTS for distributed in (False, True)]
SIDES += [
    Side(Layout(data=2), zero=1),
    ZERO2,
    Side(Layout(data=4), zero=3),
    Side(Layout(tensor=2, data=2, sequence_parallel=True), zero=3),
]


@pytest.mark.nightly
@pytest.mark.parametrize(("before", "after"), itertools.permutations(SIDES, 2), ids=str)
def test_every_pair_of_layouts(
    world: World, source: Source, tmp_path: Path, before: Side, after: Side
) -> None:
    check_other_layout(world, source, tmp_path, before, after)


@pytest.mark.parametrize(
    ("half", "full"),
    [
        (DP2._replace(bf16=True), Side(Layout(pipeline=2))),
        *(
            pytest.param(
                Side(Layout(data=2), bf16=True, zero=zero),
                ZERO3,
                marks=pytest.mark.nightly,
            )
            for zero in (1, 2, 3)
        ),
        pytest.param(
            Side(Layout(tensor=2), bf16=True),
            Side(Layout(data=2), distributed=True),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=str,
)
def test_bf16_and_fp32_load_each_other_exactly(
    world: World, source: Source, tmp_path: Path, half: Side, full: Side
) -> None:
    """The fp32 copies that a bf16 run has become the weights of an fp32 run, and back."""
    found = source("cyclic", half)
    once = go_on(world, found, "cyclic", full, tmp_path / "once")
    bf16, fp32 = state_of(found.folder), state_of(once.folder)
    copies = f"{OPTIMIZER}state.fp32_param."
    weights = {name: fp32[name] for name in fp32 if not name.startswith(OPTIMIZER)}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert_equal({name: bf16[copies + name] for name in weights}, weights)
    assert any(not torch.equal(bf16[name].float(), weights[name]) for name in weights)
    set_latest(once.folder, 3)
    twice = go_on(world, once, "cyclic", half, tmp_path / "twice")
    assert twice.losses == {step: found.losses[step] for step in (4, 5, 6)}
    assert_equal(bf16, state_of(twice.folder))


def test_the_optimizer_may_be_left_out(world: World, source: Source, tmp_path: Path) -> None:
    """Then its state starts at zero, and the copies of a bf16 run follow the weights."""
    found = source("cyclic", DP2)
    side = Side(Layout(pipeline=2), bf16=True)
    words = [*VOCABULARY, *side.flags, "--load", str(found.folder), "--no-load-optim"]
    world.run(save_again_and_go_on, side.layout, [*words, "--save", str(tmp_path)])
    state, before = state_of(tmp_path), state_of(found.folder)
    assert state[UPDATES].item() == 0
    for name in (name for name in before if not name.startswith(OPTIMIZER)):
        assert same_bits(state[name], before[name].bfloat16())
        assert same_bits(state[f"{OPTIMIZER}state.fp32_param.{name}"], state[name].float())
        assert not state[f"{OPTIMIZER}state.exp_avg.{name}"].any()
