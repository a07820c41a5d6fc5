"""The loss in chunks and gradients written into the fp32 buffer, at the sizes of real runs."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.megatron_api import linear, loss
from megatron_kvshare.megatron_api.optimizer import wrap_data_parallel
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.parameters import gather_by_name, initialize
from megatron_kvshare.sharing.map import SharingMap
from tests.product import Tiny, random_tokens, relative_differences

MAP = SharingMap.parse("0_1_1_3")
SIZES = {"cuda": (4, 2048, 32_000, 1024), "cpu": (2, 48, 500, 64)}
"""Sequences, their length, vocabulary, hidden size."""
ROUNDING = 2e-2


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_chunks_and_buffer(
    here: ParallelState, untied: bool, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16, against the same in fp32 by all logits at once and autograd; a vocabulary that is no
    multiple of anything, masked tokens, two microbatches."""
    device = here.platform.device
    sequences, length, vocabulary, hidden = SIZES[device.type]
    tokens, labels = (
        random_tokens(vocabulary - 7, sequences, length, seed).to(device) for seed in (0, 1)
    )
    counted = torch.rand(sequences, length, device=device) < 0.8
    if device.type == "cuda":
        assert tokens.numel() * vocabulary > loss.logits_per_chunk(device)
    else:
        monkeypatch.setattr(loss, "logits_per_chunk", lambda device: 20 * vocabulary)
        monkeypatch.setattr(linear, "_adds", lambda weight: True)

    def run(bf16: bool, wrapped: bool) -> tuple[float, dict[str, torch.Tensor]]:
        tiny = Tiny(
            hidden=hidden,
            ffn=2 * hidden,
            heads=hidden // 16,
            vocabulary=vocabulary - 7,
            untied=untied,
            extra={"bf16": bf16, "seq_length": length},
        )
        parallel = ParallelConfig(overlap_grad_reduce=overlap)
        net = tiny.model(MAP, here, parallel=parallel)
        initialize(net, seed=1)
        if not bf16:  # the same weights
            for weight in net.parameters():
                weight.data = weight.data.bfloat16().float()
        model = wrap_data_parallel(net, parallel) if wrapped else net
        if wrapped:
            new = device.type == "cpu" or linear.adds_in_fp32(torch.bfloat16, device)
            assert all(weight.adds_in_place == new for weight in net.parameters())
        for last in (False, True):
            held_back = wrapped and overlap and not last
            with model.no_sync() if held_back else contextlib.nullcontext():
                total = model(tokens, labels, counted=counted).loss / counted.sum()
                total.backward()
        if wrapped and overlap:
            model.finish_grad_sync()
        return float(total.detach()), gather_by_name([net], here, "grad")

    got_loss, got = run(bf16=True, wrapped=True)
    with monkeypatch.context() as patch:
        patch.setattr(loss, "logits_per_chunk", lambda device: tokens.numel() * 2 * vocabulary)
        wanted_loss, wanted = run(bf16=False, wrapped=False)
    assert got_loss == pytest.approx(wanted_loss, rel=1e-3)
    differences = relative_differences(got, wanted)
    assert max(differences.values()) < ROUNDING, differences
