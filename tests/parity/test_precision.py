"""bf16 on the CPU, and fp32 and bf16 on a GPU, against the naive model in fp64 on the CPU.

On a GPU attention runs in the fused kernels, norms in torch's own: another program than the CPU's,
so every named map goes through it. In bf16 the naive model takes the rounded weights; what is left
is the rounding of activations and gradients, 2^-9 per operation, while a lost mask or pass is off
by tens of per cent.
"""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.map import SharingMap
from tests import oracle
from tests.parity.cases import one_of_each_pattern
from tests.product import (
    Tiny,
    load_by_name,
    loss_and_gradients,
    random_tokens,
    relative_differences,
)

LENGTH = 16
TOLERANCES = {"fp32": (1e-5, 1e-5, 1e-5), "bf16": (2e-2, 3e-3, 6e-2)}
"""Largest relative difference of logits, of the loss and of any gradient."""
PLACES = [
    pytest.param("cpu", "bf16", id="cpu-bf16"),
    pytest.param("cuda", "fp32", id="gpu-fp32", marks=pytest.mark.gpu),
    pytest.param("cuda", "bf16", id="gpu-bf16", marks=pytest.mark.gpu),
]
DOCUMENTS = torch.tensor([[0] * 16, [1] * 5 + [2] * 11])


@pytest.mark.parametrize(("device", "precision"), PLACES)
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@one_of_each_pattern()
def test_logits_loss_and_gradients(
    sharing: SharingMap, packed: bool, device: str, precision: str, single: ParallelState
):
    if single.platform.device.type != device:
        pytest.skip(f"this process runs on {single.platform.device}")
    tiny = Tiny(extra={"bf16": precision == "bf16"})
    weights = tiny.weights(sharing)
    if precision == "bf16":
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    documents = DOCUMENTS if packed else None
    tokens, labels = (random_tokens(tiny.vocabulary, 2, LENGTH, seed) for seed in (0, 1))
    passes = (1, 2)

    naive = tiny.oracle(sharing, weights)
    logits = naive.iterated(tokens, passes, documents)
    loss, gradients = oracle.loss_and_gradients(naive, tokens, labels, passes, documents=documents)

    model = tiny.model(sharing, single, passes)
    load_by_name(model, weights)
    there = None if documents is None else documents.to(device)
    with torch.no_grad():
        got = model(tokens.to(device), document_ids=there).value[..., : tiny.vocabulary].cpu()
    got_loss, got_gradients = loss_and_gradients(
        model, single, tokens, labels, document_ids=documents
    )
    of_logits, of_loss, of_gradients = TOLERANCES[precision]
    assert (got - logits).abs().max() <= of_logits * logits.abs().max()
    assert abs(got_loss - loss) <= of_loss * loss
    differences = relative_differences(got_gradients, gradients)
    assert max(differences.values()) <= of_gradients, max(differences, key=differences.get)
