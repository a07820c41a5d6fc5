"""Layouts in bf16 over gloo, and in fp32 and bf16 over NCCL, against one CPU rank in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import jobs
from tests.distributed.jobs import Case
from tests.distributed.world import Layout, World
from tests.maps import NINE
from tests.product import relative_differences

TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 6e-2)}
"""Largest relative difference of ten losses and of any first gradient."""
LAYOUTS = {
    "one": (Layout(), {}),
    "tp2": (Layout(2), {}),
    "tp4-sp": (Layout(4, sequence_parallel=True), {}),
    "dp2": (Layout(data=2), {}),
    "tp2-sp-dp2-sharded": (Layout(2, 2, True), {"use_distributed_optimizer": True}),
}


def case_of(pattern: str, bf16: bool = False, **settings) -> Case:
    sharing = {"kv_pattern": pattern, "kv_layers": 3}
    return Case(sharing=sharing, kv_heads=2, steps=10, model={"bf16": bf16}, **settings)


def assert_trains_like_fp32_on_the_cpu(got: jobs.Trained, cpu: jobs.Trained, precision: str):
    of_losses, of_gradients = TOLERANCES[precision]
    for loss, expected in zip(got.losses, cpu.losses, strict=True):
        assert abs(loss - expected) <= of_losses * expected
    differences = relative_differences(got.gradients, cpu.gradients)
    assert max(differences.values()) <= of_gradients, max(differences, key=differences.get)


@pytest.mark.parametrize("pattern", ["pizza-bottom", "sandwich-top", "lasagna-middle"])
def test_bf16_on_the_cpu(pattern: str, world: World, single):
    spread, parallel = LAYOUTS["tp2-sp-dp2-sharded"]
    got = world.run(jobs.train, spread, case_of(pattern, bf16=True, parallel=parallel))
    cpu = jobs.train(single, Layout(), case_of(pattern))
    assert_trains_like_fp32_on_the_cpu(got[0], cpu, "bf16")


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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("pattern", NINE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nccl_trains_like_one_cpu_rank(
    layout: str, pattern: str, precision: str, world: World, gpu_world: World
):
    spread, parallel = LAYOUTS[layout]
    if spread.world_size > gpu_world.size:
        pytest.skip(f"{spread} needs {spread.world_size} GPUs, this machine has {gpu_world.size}")
    case = case_of(pattern, bf16=precision == "bf16", parallel=parallel)
    got = gpu_world.run(jobs.train, spread, case)
    cpu = world.run(jobs.train, Layout(), case_of(pattern))
    assert_trains_like_fp32_on_the_cpu(got[0], cpu[0], precision)
