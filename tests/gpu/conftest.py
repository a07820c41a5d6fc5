"""Runs on one GPU; the same code runs on the CPU at a small size, so that nothing but the device is
new where it is rented."""

from __future__ import annotations

import pytest

from megatron_kvshare.megatron_api.parallel import ParallelState
from tests.parity.test_gpu_route import skip_elsewhere

GPU = pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def here(request: pytest.FixtureRequest, single: ParallelState) -> ParallelState:
    """This process, where it runs on the device that the test is for."""
    skip_elsewhere(request.param, single)
    return single


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.nightly), GPU])
def here_nightly(request: pytest.FixtureRequest, single: ParallelState) -> ParallelState:
    """The same for what takes long on the CPU."""
    skip_elsewhere(request.param, single)
    return single
