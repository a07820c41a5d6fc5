"""Clipping: what the optimizer steps with has the norm that was asked for, in every arrangement."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from megatron_kvshare.config import ParallelConfig, TrainConfig
from megatron_kvshare.megatron_api import optimizer as optimizers
from megatron_kvshare.megatron_api.optimizer import (
    DistributedDataParallel,
    MegatronOptimizer,
    build_optimizer,
    gradient_norm,
    update_parameters,
    wrap_data_parallel,
    zero_gradients,
)
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.parameters import gather_by_name, initialize
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import jacobi_plan
from tests.product import Tiny, assert_close_by_name

TYPES = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
SHARDED = pytest.mark.parametrize("sharded", [False, True], ids=["whole", "distributed-optimizer"])
SHARES = pytest.mark.parametrize("share", [0.5, 2.0], ids=["clipped", "below-the-limit"])


class Stepping(NamedTuple):
    """A model whose gradients are ready, with their norm."""

    net: KVShareGPT
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    norm: float

    @classmethod
    def made(cls, single: ParallelState, bf16: bool, sharded: bool) -> Stepping:
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
        (model(tokens, tokens).loss / tokens.numel()).backward()
        model.finish_grad_sync()
        norm = gradient_norm([model], optimizer)
        assert norm > 0
        return cls(net, model, optimizer, norm)


@TYPES
@SHARDED
@SHARES
def test_clip(single: ParallelState, bf16: bool, sharded: bool, share: float) -> None:
    _, model, optimizer, norm = Stepping.made(single, bf16, sharded)
    stepped_with = {}
    take_step = optimizer.step_with_ready_grads

    def observe() -> bool:
        stepped_with["norm"] = float(optimizer.get_grad_norm())
        return take_step()

    optimizer.step_with_ready_grads = observe
    update_parameters([model], optimizer, share * norm, norm)
    assert stepped_with["norm"] == pytest.approx(min(share, 1.0) * norm, rel=1e-5)


@TYPES
@SHARDED
@SHARES
def test_clipping_in_the_step_is_clipping_before_it(
    single: ParallelState, bf16: bool, sharded: bool, share: float, monkeypatch
) -> None:
    """What only a GPU does, here by torch's fused AdamW of the CPU."""

    def weights(in_step: bool) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(optimizers, "scale_in_step", lambda inner: in_step)
        torch.manual_seed(0)
        net, model, optimizer, norm = Stepping.made(single, bf16, sharded)
        before = gather_by_name([net], single, "weight")
        update_parameters([model], optimizer, share * norm, norm)
        after = gather_by_name([net], single, "weight")
        return {name: (after[name] - before[name]).float() for name in after}

    expected = weights(in_step=False)
    assert all(moved.abs().max() > 0 for moved in expected.values() if moved.dim() == 2)
    assert_close_by_name(weights(in_step=True), expected, 2e-3 if bf16 else 1e-5)


@TYPES
@SHARDED
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_dividing_in_the_step_is_dividing_before_it(
    single: ParallelState, bf16: bool, sharded: bool, share: float, monkeypatch
) -> None:
    """The division by the tokens of the batch too, clipped (share of the norm) or not (0)."""
    tokens = torch.tensor(7)

    def stepped(in_step: bool) -> tuple[float, dict[str, torch.Tensor]]:
        monkeypatch.setattr(optimizers, "scale_in_step", lambda inner: in_step)
        torch.manual_seed(0)
        net, model, optimizer, whole = Stepping.made(single, bf16, sharded)
        before = gather_by_name([net], single, "weight")
        buffer = net.decoder.layers[0].mlp.linear_fc1.weight.main_grad
        unscaled = buffer.clone()
        model.scale_gradients(1.0 / tokens)
        assert torch.equal(buffer, unscaled) == in_step, "the pass over the buffer"
        norm = gradient_norm([model], optimizer)
        assert norm == pytest.approx(whole / 7, rel=1e-5)
        update_parameters([model], optimizer, share * norm, norm)
        after = gather_by_name([net], single, "weight")
        return norm, {name: (after[name] - before[name]).float() for name in after}

    (norm, expected), (again, moved) = stepped(in_step=False), stepped(in_step=True)
    assert again == pytest.approx(norm, rel=1e-6)
    assert all(each.abs().max() > 0 for each in expected.values() if each.dim() == 2)
    assert_close_by_name(moved, expected, 2e-3 if bf16 else 1e-5)


def test_what_is_put_off_can_be_done_at_once(single: ParallelState, monkeypatch) -> None:
    monkeypatch.setattr(optimizers, "scale_in_step", lambda inner: True)
    _, model, optimizer, whole = Stepping.made(single, bf16=False, sharded=False)
    model.scale_gradients(torch.tensor(0.5))
    model.finish_gradients()
    assert gradient_norm([model], optimizer) == pytest.approx(whole / 2, rel=1e-5)
    model.scale_gradients(torch.tensor(0.5))
    model.zero_grad_buffer()
    assert model.put_off is None and gradient_norm([model], optimizer) == 0
