"""Gradients written straight into DDP's buffer are those that autograd collects, use by use."""

from __future__ import annotations

import contextlib

import pytest

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.megatron_api import linear
from megatron_kvshare.megatron_api.optimizer import wrap_data_parallel
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.parameters import gather_by_name, initialize
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import jacobi_plan
from tests.maps import NINE
from tests.product import Tiny, assert_close_by_name, random_tokens, relative_differences

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
            (model(tokens, labels).loss / labels.numel()).backward()
        return gather_by_name([net], single, "grad")

    assert_close_by_name(gradients(wrapped=True), gradients(wrapped=False), 1e-6)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("pattern", ["pizza-bottom", "sandwich-middle", "lasagna-top"])
def test_bf16_weights_add_in_fp32(
    pattern: str, untied: bool, overlap: bool, single: ParallelState, monkeypatch
) -> None:
    """The protocol of bf16 weights, whose product a GPU alone has: here by a slow one. What is
    added is nearer to the fp32 gradients than what autograd rounds in between."""
    plan = jacobi_plan(build_map(8, pattern, 3), forward_sweeps=1, backward_sweeps=2)
    tokens, labels = (random_tokens(40, 2, 12, seed) for seed in (0, 1))

    def gradients(bf16: bool, in_place: bool) -> dict:
        monkeypatch.setattr(linear, "_adds", lambda weight: in_place)
        tiny = Tiny(untied=untied, extra={"bf16": bf16})
        parallel = ParallelConfig(overlap_grad_reduce=overlap)
        net = KVShareGPT(tiny.spec(plan.map), parallel, plan, single)
        initialize(net, seed=1)
        if not bf16:  # the same weights
            for weight in net.parameters():
                weight.data = weight.data.bfloat16().float()
        model = wrap_data_parallel(net, parallel)
        for left in reversed(range(MICROBATCHES)):
            with model.no_sync() if overlap and left else contextlib.nullcontext():
                (model(tokens, labels).loss / labels.numel()).backward()
        if overlap:
            model.finish_grad_sync()
        return gather_by_name([net], single, "grad")

    exact = gradients(bf16=False, in_place=True)
    added, rounded = (
        relative_differences(gradients(bf16=True, in_place=in_place), exact)
        for in_place in (True, False)
    )
    matrices = [name for name, gradient in exact.items() if gradient.dim() == 2]
    assert max(added[name] for name in matrices) < 3e-2
    assert sum(added[name] for name in matrices) <= sum(rounded[name] for name in matrices)
