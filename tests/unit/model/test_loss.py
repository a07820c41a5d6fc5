"""The loss in chunks, whose gradient is made in forward, is the loss of all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.megatron_api import loss
from megatron_kvshare.megatron_api.linear import add_product_, adds_in_fp32
from megatron_kvshare.megatron_api.optimizer import wrap_data_parallel
from megatron_kvshare.model.parameters import gather_by_name
from megatron_kvshare.sharing.map import SharingMap
from tests.product import Tiny, assert_close_by_name, load_by_name, random_tokens

MAP = SharingMap.parse("0_1_1_3")
SEQUENCES, LENGTH = 2, 11
TOKENS = SEQUENCES * LENGTH


@pytest.fixture(params=["one chunk", "even", "last one shorter", "token by token", "not at all"])
def chunked(request, monkeypatch) -> str:
    """How the tokens are cut."""
    tokens = {"one chunk": TOKENS - 1, "even": 2, "last one shorter": 4, "token by token": 1}
    if request.param in tokens:
        columns = tokens[request.param] * Tiny().config(4).padded_vocab_size(1, 40)
        monkeypatch.setattr(loss, "logits_per_chunk", lambda device: columns)
    return request.param


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_torch(chunked, untied, bf16, single):
    """Compared with torch's cross entropy over the model's own logits, in fp64."""
    tiny = Tiny(untied=untied, extra={"bf16": bf16})
    model = tiny.model(MAP, single)
    load_by_name(model, tiny.weights(MAP))
    tokens, labels = (random_tokens(tiny.vocabulary, SEQUENCES, LENGTH, seed) for seed in (0, 1))
    counted = torch.rand(SEQUENCES, LENGTH) < 0.7

    logits = model(tokens).value[..., : tiny.vocabulary].double()
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    expected = torch.where(counted, each, 0.0)
    (expected.sum() * 0.25).backward()
    wanted = gather_by_name([model], single, "grad")

    model.zero_grad(set_to_none=True)
    output = model(tokens, labels, counted=counted)
    assert torch.equal(output.value == 0, ~counted) and not output.value.requires_grad
    torch.testing.assert_close(output.value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss.double(), expected.sum(), rtol=1e-5, atol=1e-5)
    (output.loss * 0.25).backward()
    close = 3e-2 if bf16 else 1e-5
    assert_close_by_name(gather_by_name([model], single, "grad"), wanted, close)


def test_without_gradient_the_losses_are_the_same(chunked, single):
    tiny = Tiny()
    model = tiny.model(MAP, single)
    load_by_name(model, tiny.weights(MAP))
    tokens, labels = (random_tokens(tiny.vocabulary, SEQUENCES, LENGTH, seed) for seed in (0, 1))
    trained = model(tokens, labels)
    with torch.no_grad():
        seen = model(tokens, labels)
    assert torch.equal(trained.value, seen.value) and torch.equal(trained.loss, seen.loss)
    assert not seen.loss.requires_grad


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_the_gradient_reaches_the_buffer(chunked, untied, single):
    """Twice in a row, beside what the embedding adds where it is tied."""
    tiny = Tiny(untied=untied)
    tokens, labels = (random_tokens(tiny.vocabulary, SEQUENCES, LENGTH, seed) for seed in (0, 1))

    def gradients(wrapped: bool) -> dict[str, torch.Tensor]:
        net = tiny.model(MAP, single)
        load_by_name(net, tiny.weights(MAP))
        model = wrap_data_parallel(net, ParallelConfig()) if wrapped else net
        for _ in range(2):
            model(tokens, labels).loss.backward()
        return gather_by_name([net], single, "grad")

    assert_close_by_name(gradients(True), gradients(False), 1e-6)


def test_the_logits_of_a_batch_never_exist(single, monkeypatch):
    """No tensor of the whole computation, forward and backward, is as large."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for each in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return made

    tiny = Tiny(vocabulary=400)
    model = tiny.model(MAP, single)
    load_by_name(model, tiny.weights(MAP))
    padded = tiny.config(4).padded_vocab_size(1, tiny.vocabulary)
    tokens = random_tokens(tiny.vocabulary, 8, 64)
    assert tokens.numel() * padded > 2 * max(each.numel() for each in model.parameters())
    for chunks, below in ((1, False), (64, True)):
        size = tokens.numel() * padded // chunks
        monkeypatch.setattr(loss, "logits_per_chunk", lambda device, size=size: size)
        largest = 0
        with Watch():
            model(tokens, tokens).loss.backward()
        assert (largest < tokens.numel() * padded) == below


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_add_up_in_fp32(dtype):
    a, b = torch.randn(5, 300).to(dtype), torch.randn(300, 7).to(dtype)
    out = torch.ones(5, 7)
    add_product_(out, a, b)
    torch.testing.assert_close(out.double(), 1 + a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_no_cpu_adds_16_bit_products_in_fp32():
    """So autograd adds its gradients; a torch that can one day is asked, not named."""
    assert not adds_in_fp32(torch.bfloat16, torch.device("cpu"))
