"""Layouts in bf16 over gloo, and in fp32 and bf16 over NCCL, against one CPU rank in fp32.

Short texts everywhere, and a long one in bf16 whose subsets are read block by block: on the CPU
there with stand-ins for the GPU's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.context import BLOCKWISE_FROM
from megatron_kvshare.sharing.solver import RECIPES
from tests.distributed import jobs
from tests.distributed.jobs import Case, Trained
from tests.distributed.test_parallel import SHARDED
from tests.distributed.world import Layout, World
from tests.gpu_kernels import on_gpu_route
from tests.maps import NINE
from tests.product import relative_differences

TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 6e-2)}
"""Largest relative difference of ten losses and of any first gradient."""
OVERLAP = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "one": (Layout(), {}),
    "tp2": (Layout(2), {}),
    "tp4-sp": (Layout(4, sequence_parallel=True), {}),
    "dp2": (Layout(data=2), {}),
    "dp2-overlap": (Layout(data=2), OVERLAP),
    "tp2-sp-dp2-sharded": (Layout(2, 2, True), SHARDED),
    "pp2": (Layout(pipeline=2), {}),
    "pp4": (Layout(pipeline=4), {}),
    "pp2-vpp2": (Layout(pipeline=2, virtual=2), {}),
    "tp2-pp2": (Layout(2, pipeline=2), {}),
}
BLOCKWISE = {
    "one": Layout(),
    "tp2": Layout(2),
    "tp2-sp": Layout(2, sequence_parallel=True),
    "dp2": Layout(data=2),
    "pp2": Layout(pipeline=2),
}
SECONDS = 400
"""Of the long case on a busy CPU: half a minute where nothing else runs."""
STRIDED, STRIDE = next((name, each.stride) for name, each in RECIPES.items() if each.stride > 1)
LONG = "long"
"""The case whose subsets are long enough for blocks; the others have the name of their pattern."""


def case_of(pattern: str, bf16: bool = False, **settings) -> Case:
    if pattern == LONG:
        return long_case(bf16)
    sharing = {"kv_pattern": pattern, "kv_layers": 3}
    return Case(sharing=sharing, kv_heads=2, steps=10, model={"bf16": bf16}, **settings)


def long_case(bf16: bool) -> Case:
    return Case(
        sharing={"kv_pattern": "sandwich-top", "kv_layers": 3, "kv_recipe": STRIDED},
        kv_heads=2,
        steps=3,
        model={"bf16": bf16, "seq_length": STRIDE * BLOCKWISE_FROM},
        train={"micro_batch_size": 1, "global_batch_size": 2},
    )


@pytest.fixture(scope="module")
def on_one_cpu(world: World) -> Callable[[str], Trained]:
    """What a case is compared with, computed once: fp32 on one CPU rank."""

    def train(pattern: str) -> Trained:
        return world.run(jobs.train, Layout(), case_of(pattern), timeout_seconds=SECONDS)[0]

    return cache(train)


def assert_trains_like_fp32_on_the_cpu(got: jobs.Trained, cpu: jobs.Trained, precision: str):
    of_losses, of_gradients = TOLERANCES[precision]
    for loss, expected in zip(got.losses, cpu.losses, strict=True):
        assert abs(loss - expected) <= of_losses * expected
    differences = relative_differences(got.gradients, cpu.gradients)
    assert max(differences.values()) <= of_gradients, max(differences, key=differences.get)


def case_on(layout: str, pattern: str, bf16: bool) -> Case:
    """As a layout trains it: stages take microbatches in turn, without them one is enough."""
    spread, parallel = LAYOUTS[layout]
    train = {"micro_batch_size": 1} if spread.pipeline > 1 else {}
    return case_of(pattern, bf16, parallel=parallel, train=train)


OVER_GLOO = [
    pytest.param(name, marks=[] if name == "tp2-sp-dp2-sharded" else pytest.mark.nightly)
    for name in LAYOUTS
]


@pytest.mark.parametrize("layout", OVER_GLOO)
@pytest.mark.parametrize("pattern", ["pizza-bottom", "sandwich-top", "lasagna-middle"])
def test_bf16_on_the_cpu(
    layout: str, pattern: str, world: World, on_one_cpu: Callable[[str], Trained]
):
    got = world.run(jobs.train, LAYOUTS[layout][0], case_on(layout, pattern, bf16=True))
    assert_trains_like_fp32_on_the_cpu(got[0], on_one_cpu(pattern), "bf16")


def train_with_stand_ins(state: ParallelState, layout: Layout, case: Case) -> tuple[Trained, int]:
    """Also how often this rank went backward through a pair of blocks."""
    with on_gpu_route() as log:
        return jobs.train(state, layout, case), log["flash_backward"]


@pytest.mark.nightly
@pytest.mark.parametrize("layout", BLOCKWISE)
def test_blocks_on_the_cpu(layout: str, world: World, on_one_cpu: Callable[[str], Trained]):
    long = case_of(LONG, bf16=True)
    got = world.run(train_with_stand_ins, BLOCKWISE[layout], long, timeout_seconds=SECONDS)
    assert any(blocks for _, blocks in got)
    assert_trains_like_fp32_on_the_cpu(got[0][0], on_one_cpu(LONG), "bf16")


@pytest.fixture(scope="session")
def gpu_world() -> Iterator[World]:
    """One NCCL worker per GPU, four at most."""
    import torch

    gpus = min(4, torch.cuda.device_count())
    if not gpus:
        pytest.skip("no GPU here")
    started = World(size=gpus)
    yield started
    started.close()


def skip_without(gpu_world: World, layout: Layout) -> None:
    if layout.world_size > gpu_world.size:
        pytest.skip(f"{layout} needs {layout.world_size} GPUs, this machine has {gpu_world.size}")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("pattern", NINE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nccl_trains_like_one_cpu_rank(
    layout: str,
    pattern: str,
    precision: str,
    gpu_world: World,
    on_one_cpu: Callable[[str], Trained],
):
    spread = LAYOUTS[layout][0]
    skip_without(gpu_world, spread)
    case = case_on(layout, pattern, bf16=precision == "bf16")
    got = gpu_world.run(jobs.train, spread, case)
    assert_trains_like_fp32_on_the_cpu(got[0], on_one_cpu(pattern), precision)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", BLOCKWISE)
def test_nccl_trains_by_blocks_like_one_cpu_rank(
    layout: str, gpu_world: World, on_one_cpu: Callable[[str], Trained]
):
    skip_without(gpu_world, BLOCKWISE[layout])
    got = gpu_world.run(jobs.train, BLOCKWISE[layout], case_of(LONG, bf16=True))
    assert_trains_like_fp32_on_the_cpu(got[0], on_one_cpu(LONG), "bf16")
