"""Fixtures all tests share.

A run is either on the CPU (the default; GPUs are hidden, so that results do not depend on the
machine) or, with `-m gpu`, on GPUs, where the same suites compare with the CPU's fp32 and fp64.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.distributed.world import World

os.environ.setdefault("OMP_NUM_THREADS", "1")

with contextlib.suppress(ImportError):  # a GPU machine runs its suites without hypothesis
    from hypothesis import HealthCheck, settings

    # A busy machine is no fault of the code, so time is not judged; and a run of the suite tries
    # the same examples as the one before, so that what fails is what has changed.
    settings.register_profile(
        "kvshare",
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("kvshare")


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.option.markexpr or "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `pytest -n 2 --dist loadgroup`, tests that share something costly run in one process."""
    for item in items:
        if "world" in getattr(item, "fixturenames", ()) or "distributed" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("world"))
        elif "integration" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("integration"))
        elif item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.xdist_group("gpu"))


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is the same whatever terminal, pipe or CI the tests run in."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def single() -> Iterator:
    """The parallel state of this process alone."""
    import torch

    from megatron_kvshare.megatron_api import parallel

    torch.set_num_threads(1)
    yield parallel.initialize()
    parallel.destroy()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Four gloo workers; started by the first job that needs them."""
    started = World(size=4, environment={"CUDA_VISIBLE_DEVICES": ""})
    yield started
    started.close()
