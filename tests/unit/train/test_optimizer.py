"""Clipping: what the optimizer steps with has the norm that was asked for, in every arrangement."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.config import ParallelConfig, TrainConfig
from megatron_kvshare.megatron_api.optimizer import (
    build_optimizer,
    gradient_norm,
    update_parameters,
    wrap_data_parallel,
    zero_gradients,
)
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.parameters import initialize
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import jacobi_plan
from tests.product import Tiny


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "distributed-optimizer"])
@pytest.mark.parametrize("share", [0.5, 2.0], ids=["clipped", "below-the-limit"])
def test_clip(single: ParallelState, bf16: bool, sharded: bool, share: float) -> None:
    sharing = build_map(4, "lasagna-top", 2)
    parallel = ParallelConfig(use_distributed_optimizer=sharded)
    net = KVShareGPT(
        Tiny(extra={"bf16": bf16}).spec(sharing), parallel, jacobi_plan(sharing), single
    )
    initialize(net, seed=3)
    model = wrap_data_parallel(net, parallel)
    optimizer = build_optimizer([model], TrainConfig(lr=1e-3), parallel, bf16)
    zero_gradients([model], optimizer)
    tokens = torch.randint(0, 40, (2, 16))
    model(tokens, tokens).value.mean().backward()
    model.finish_grad_sync()
    norm = gradient_norm(optimizer)
    assert norm > 0

    stepped_with = {}
    take_step = optimizer.step_with_ready_grads

    def observe() -> bool:
        stepped_with["norm"] = float(optimizer.get_grad_norm())
        return take_step()

    optimizer.step_with_ready_grads = observe
    update_parameters([model], optimizer, share * norm, norm)
    assert stepped_with["norm"] == pytest.approx(min(share, 1.0) * norm, rel=1e-5)
