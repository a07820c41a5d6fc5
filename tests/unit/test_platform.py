"""The CPU stand-ins for CUDA: there when asked for, gone without a trace, off the hot path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_kvshare.megatron_api.platform import ORIGINALS, activate, cpu_mode
from megatron_kvshare.model.gpt import KVShareGPT
from tests.distributed import jobs
from tests.distributed.jobs import Case
from tests.distributed.world import Layout

CUDA = "current_device synchronize manual_seed get_rng_state set_rng_state Stream stream"
CUDA_NAMES = (*CUDA.split(), "current_stream", "default_stream")
MEGATRON_NAMES = ("_get_cuda_rng_state", "_set_cuda_rng_state")


def replaced() -> list:
    return [getattr(torch.cuda, name) for name in CUDA_NAMES] + [
        getattr(megatron_random, name) for name in MEGATRON_NAMES
    ]


def put_back() -> None:
    """Undo :func:`activate`."""
    for name, original in ORIGINALS.items():
        setattr(megatron_random if name in MEGATRON_NAMES else torch.cuda, name, original)
    ORIGINALS.clear()


@pytest.fixture
def untouched() -> Iterator[None]:
    """torch as it is without the stand-ins, whatever ran before; other tests find them again."""
    put_back()
    yield
    put_back()
    activate("gloo")


def test_stand_ins_come_once_and_go_without_a_trace(untouched):
    before = replaced()
    platform = activate()
    assert (platform.device, platform.backend) == (torch.device("cpu"), "gloo")
    assert not platform.is_gpu
    during = replaced()
    assert all(a is not b for a, b in zip(before, during, strict=True))
    assert activate() == platform
    assert all(a is b for a, b in zip(during, replaced(), strict=True))
    put_back()
    assert all(a is b for a, b in zip(before, replaced(), strict=True))


def test_stand_ins_behave(untouched):
    activate()
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_mode_sends_cuda_to_the_cpu_inside_only(untouched):
    activate()
    with cpu_mode():
        tensors = [
            torch.zeros(2, device="cuda"),
            torch.zeros(2, device=torch.device("cuda", 0)),
            torch.zeros(2).cuda(),
            torch.zeros(2).to("cuda"),
            torch.zeros(2).to(device="cuda", dtype=torch.bfloat16),
        ]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
        # Gradient clipping and the distributed optimizer of megatron-core compare this name.
        assert tensors[0].type() == "torch.cuda.FloatTensor"
        assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_mode_does_nothing_without_the_stand_ins(untouched):
    with cpu_mode():
        assert torch.zeros(2).type() == "torch.FloatTensor"


def test_forward_and_backward_run_outside_the_mode(single, monkeypatch):
    """The mode slows every torch call, and forward and backward are where the calls are."""
    seen = []
    plain = KVShareGPT.forward

    def watched(self, *arguments, **named):
        output = plain(self, *arguments, **named)
        seen.append(type_of_a_tensor())
        output.loss.register_hook(lambda _: seen.append(type_of_a_tensor()))
        return output

    monkeypatch.setattr(KVShareGPT, "forward", watched)
    jobs.train(single, Layout(), Case(sharing={"kv_pattern": "standard"}))
    assert seen == ["torch.FloatTensor"] * 2


def type_of_a_tensor() -> str:
    return torch.zeros(1).type()


def test_without_a_gpu_megatron_compiles_nothing():
    from megatron.core import jit

    assert torch.compile.__module__ == "torch", "torch's own is back after the import"
    assert torch.cuda.is_available() or jit.jit_fuser is jit.noop_decorator
