"""Attention as a GPU computes it, its kernels stood in for, against explicit masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_kvshare.kernels import choice
from megatron_kvshare.model.core_attention import attend
from megatron_kvshare.model.kv import KV, KVBlocks
from megatron_kvshare.model.visibility import SequenceLayout, Visibility
from tests import oracle
from tests.gpu_kernels import FlashOperators, Log, on_gpu_route

BATCH, HEADS = 2, 4
CPU = torch.device("cpu")
BF16 = 2e-2
"""Relative norm that rounding to bf16 may cost; it costs 3e-3."""

each_order = pytest.mark.parametrize("strict", [False, True], ids=["causal", "strict"])


def random_heads(tokens: int, heads: int, width: int, seed: int, dtype=torch.bfloat16) -> Tensor:
    """[tokens, b, heads, d] with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, BATCH, heads, width, generator=generator).to(dtype).requires_grad_()


def naive(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    wide = [x.double() for x in (query, key, value)]
    rows = [oracle.attend(*(x[:, row] for x in wide), seen) for row in range(BATCH)]
    return torch.stack(rows, dim=1)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    weights = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)]


def worst(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative norm of a difference; tensors that are zero have to be so exactly."""
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(got, wanted, strict=True)]
    assert all(x.isfinite().all() for pair in pairs for x in pair)
    return max(float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in pairs)


@each_order
@pytest.mark.parametrize(("width", "kv_heads"), [(8, 1), (64, 2), (64, 4), (128, 2)])
@pytest.mark.parametrize(("length", "stride"), [(302, 2), (301, 4), (520, 4), (9, 4)])
def test_token_subsets(length: int, stride: int, kv_heads: int, width: int, strict: bool):
    """Every pair of blocks, at lengths of less than a tile, of several, and not of whole ones."""
    for offset in range(stride):
        query = random_heads(len(range(offset, length, stride)), HEADS, width, 0)
        key, value = (random_heads(length, kv_heads, width, seed) for seed in (1, 2))
        for known in (1, stride):
            blocks = KVBlocks.of(KV(key, value), stride).blocks
            source = KVBlocks((*blocks[:known], *[None] * (stride - known)))
            with on_gpu_route() as log:
                out = attend(query, source, Visibility(strict, offset=offset))
                got = with_gradients(out, [query, key, value])
            is_known = torch.arange(length) % stride < known
            seen = oracle.visible([0] * length, strict, None)[offset::stride] & is_known
            wanted = with_gradients(naive(query, key, value, seen), [query, key, value])
            assert worst(got, wanted) < BF16, (offset, known)
            assert log["flash_forward"] == log["flash_backward"] > 0 and not log["sliced"]


DOCUMENTS = torch.tensor([[0] * 50 + [1] + [2] * 89, [3] * 140])


@each_order
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("window", [None, 33])
def test_all_tokens_and_masks(window, packed, dtype, kv_heads, strict):
    """The front end is asked for nothing that it would compute unfused, or leave undefined."""
    length = DOCUMENTS.shape[1]
    inputs = [random_heads(length, heads, 16, heads, dtype) for heads in (HEADS, kv_heads)]
    inputs.append(random_heads(length, kv_heads, 16, 7, dtype))
    layout = SequenceLayout(length, CPU, dtype, DOCUMENTS if packed else None)
    visible = layout.visibility(strict, window)
    with on_gpu_route() as log:
        got = with_gradients(attend(inputs[0], KV(*inputs[1:]), visible), inputs)
    assert log["masked" if packed or window else "causal"] == 1
    rows = []
    for row in range(BATCH):
        of_row = DOCUMENTS[row].tolist() if packed else [0] * length
        seen = oracle.visible(of_row, strict, window)
        rows.append(oracle.attend(*(x[:, row].double() for x in inputs), seen))
    wanted = with_gradients(torch.stack(rows, dim=1), inputs)
    assert worst(got, wanted) < (1e-5 if dtype == torch.float32 else BF16)


def test_old_gpus_have_no_flash(monkeypatch: pytest.MonkeyPatch):
    with on_gpu_route():
        assert choice.causal_kernel(CPU, torch.bfloat16, 64) is not None
        monkeypatch.setattr(choice, "compute_capability", lambda device: (7, 5))
        assert choice.causal_kernel(CPU, torch.bfloat16, 64) is None


class TestStandIn:
    """The stand-in keeps its own contract, or it would prove nothing."""

    @staticmethod
    def inputs(tokens: int = 200) -> list[Tensor]:
        """[b, heads, tokens, d], cut off from any graph."""
        return [random_heads(tokens, HEADS, 16, n).detach().permute(1, 2, 0, 3) for n in range(4)]

    def test_gradients(self):
        query, key, value, grad = self.inputs()
        leaves = [x.double().requires_grad_() for x in (query, key, value)]
        wanted = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        flash = FlashOperators(Log())
        out, lse, *_ = flash._scaled_dot_product_flash_attention(query, key, value, 0.0, True)
        got = flash._scaled_dot_product_flash_attention_backward(
            *(grad, query, key, value, out, lse, None, None, 200, 200, 0.0, True),
            *torch.empty(2, 2, dtype=torch.uint64),
        )
        expected = torch.autograd.grad((wanted * grad).sum(), leaves)
        assert worst([out, *got], [wanted, *expected]) < BF16

    def test_a_sliced_log_sum_exp_is_read_at_the_wrong_addresses(self):
        query, key, value, grad = (x[:, :, 1:] for x in self.inputs(201))
        flash = FlashOperators(Log())
        out, lse, *_ = flash._scaled_dot_product_flash_attention(query, key, value, 0.0, True)
        whole = torch.nn.functional.pad(lse, (1, 0))
        found = [
            flash._scaled_dot_product_flash_attention_backward(
                *(grad, query, key, value, out, each, None, None, 200, 200, 0.0, True),
                *torch.empty(2, 2, dtype=torch.uint64),
            )
            for each in (lse, whole[:, :, 1:])
        ]
        assert flash.log["sliced"] == 1
        assert worst(list(found[1]), list(found[0])) > 0.1

    def test_a_row_that_sees_nothing(self):
        """Four queries and two keys: the first two see none."""
        query, key, value, _ = (x[:, :, :4] for x in self.inputs())
        flash = FlashOperators(Log())
        out, lse, *_ = flash._scaled_dot_product_flash_attention(
            query, key[:, :, :2], value[:, :, :2], 0.0, True
        )
        assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == torch.inf).all()
        assert lse[:, :, 2:].isfinite().all()

    @pytest.mark.parametrize("wrong", ["dtype", "stride", "width", "heads"])
    def test_what_it_refuses(self, wrong: str):
        query, key, value, _ = self.inputs()
        if wrong == "dtype":
            query, key, value = (x.float() for x in (query, key, value))
        elif wrong == "stride":
            query = query.transpose(2, 3).contiguous().transpose(2, 3)
        elif wrong == "width":
            query, key, value = (x[..., :12] for x in (query, key, value))
        else:
            key, value = key[:, :3], value[:, :3]
        with pytest.raises(RuntimeError):
            FlashOperators(Log())._scaled_dot_product_flash_attention(query, key, value)
