"""Gradients written straight into DDP's buffer are those that autograd collects, use by use."""

from __future__ import annotations

import pytest

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.megatron_api.optimizer import wrap_data_parallel
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.parameters import gather_by_name, initialize
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import jacobi_plan
from tests.maps import NINE
from tests.product import Tiny, assert_close_by_name, random_tokens

MICROBATCHES = 2


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("granularity", [None, "full", "selective"])
@pytest.mark.parametrize("pattern", NINE)
def test_equal_autograd(
    pattern: str, granularity: str | None, untied: bool, single: ParallelState
) -> None:
    """Weights used several times per step, by rows, by two passes, and by embedding and head."""
    tiny = Tiny(untied=untied, extra={"recompute_granularity": granularity})
    plan = jacobi_plan(build_map(8, pattern, 3), forward_sweeps=1, backward_sweeps=2)
    tokens, labels = (random_tokens(40, 2, 12, seed) for seed in (0, 1))

    def gradients(wrapped: bool) -> dict:
        net = KVShareGPT(tiny.spec(plan.map), ParallelConfig(), plan, single)
        initialize(net, seed=1)
        model = wrap_data_parallel(net, ParallelConfig()) if wrapped else net
        assert all(getattr(p, "adds_in_place", False) == wrapped for p in net.parameters())
        for _ in range(MICROBATCHES):
            model(tokens, labels).value.mean().backward()
        return gather_by_name([net], single, "grad")

    assert_close_by_name(gradients(wrapped=True), gradients(wrapped=False), 1e-6)
