"""A run proves its compiled kernels before it trusts them.

Nothing is compiled here: the formulas that are compiled on a GPU run as plain torch, and what reads
a token subset is its mask written out (`tests/gpu_kernels.py`). That says what the check sees, not
what Triton makes; on a GPU every run checks that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_kvshare.kernels import check, choice, gated_silu, heads, norm, subset_attention
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import RECIPES, solver_plan
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.train import compiled_kernels
from megatron_kvshare.train.compiled_kernels import kernels_in_use, with_sound_kernels
from tests.distributed.world import Layout, World
from tests.gpu_kernels import DenseSubset, Log, on_one_kernel_route
from tests.product import Tiny

MODULES = (gated_silu, heads, norm)
MAP = SharingMap.parse("0_3_3_3")


def spec_and_plan(bf16: bool = True, length: int = 2048) -> tuple[ModelSpec, ExecutionPlan]:
    tiny = Tiny(window=None, extra={"bf16": bf16, "seq_length": length})
    return tiny.spec(MAP), solver_plan(MAP, RECIPES["two-sweep"])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Formulas uncompiled, and the GPU's choices."""
    with on_one_kernel_route():
        monkeypatch.setattr(choice, "compile_fault", lambda: None)
        monkeypatch.setattr(compiled_kernels, "compile_fault", lambda: None)
        monkeypatch.setattr(check, "attend_subset", DenseSubset(Log()))
        for module in MODULES:
            monkeypatch.setattr(module, "compiled", lambda formula: formula)
        yield


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_right_kernels_pass(bf16: bool, as_on_a_gpu, single: ParallelState, capsys):
    spec, plan = spec_and_plan(bf16)
    assert with_sound_kernels(spec, plan, 2, single) == spec
    told = capsys.readouterr()
    assert "Compiled kernels checked" in told.out and not told.err


def test_what_is_checked_is_what_the_run_meets(as_on_a_gpu, single: ParallelState):
    use = kernels_in_use(*spec_and_plan(), 2, single)
    assert (use.hidden, use.ffn, use.head_dim, use.query_heads, use.kv_heads) == (32, 48, 8, 4, 2)
    counts = [tuple(part.count for part in parts) for parts in use.splits]
    assert counts == [(4, 2, 2), (4,), (2, 2)]
    assert use.strides == (4,) and (use.batch, use.length) == (2, 2048)
    short = kernels_in_use(*spec_and_plan(length=2044), 2, single)
    assert not short.strides, "subsets below 512 queries read masks"


def without_mean(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    of_weight = (grad.float() * x.float() * scale).sum(0)
    return (grad.float() * weight * scale).to(x.dtype), of_weight.to(weight.dtype)


def other_half(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(up) * gate).to(gate_up.dtype)


def turned_back(grads, parts, cos: Tensor, sin: Tensor, right=heads.split_backward) -> Tensor:
    return right(grads, parts, cos, -sin)


def not_a_number(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.full_like(x, torch.nan), x.float().square().mean(-1, keepdim=True).rsqrt()


def uncompilable(*_: object) -> None:
    raise NotImplementedError("no such instruction\non this card")


FAULTS = {
    "RMSNorm: ": (norm, "norm_backward", without_mean),
    "SwiGLU: ": (gated_silu, "gated_silu_forward", other_half),
    "split into 3 and rotate: ": (heads, "split_backward", turned_back),
    "RMSNorm: inf off": (norm, "norm_forward", not_a_number),
    "NotImplementedError: no such instruction)": (norm, "norm_forward", uncompilable),
}


@pytest.mark.parametrize("shown", FAULTS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_wrong_operations_are_left_out(
    shown: str, bf16: bool, as_on_a_gpu, single: ParallelState, monkeypatch, capsys
):
    """And with them whatever is compiled: one that is wrong says little good of the others."""
    module, name, wrong = FAULTS[shown]
    monkeypatch.setattr(module, name, wrong)
    sound = with_sound_kernels(*spec_and_plan(bf16), 2, single)
    assert not sound.model.compile
    told = capsys.readouterr().err
    assert told.startswith("warning: norms, SwiGLU and rotation: plain kernels") and shown in told


class Unmasked(DenseSubset):
    """What a fall-back to full scores would be."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask) -> Tensor:
        everything = mock.Mock(seq_lengths=mask.seq_lengths)
        everything.mask_mod = lambda b, h, row, column: column >= 0 * row
        return super().__call__(query, key, value, everything)


class OneTooMany(DenseSubset):
    """Sees one more key than it may."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask) -> Tensor:
        shifted = mock.Mock(seq_lengths=mask.seq_lengths)
        shifted.mask_mod = lambda b, h, row, column: mask.mask_mod(
            b, h, row, (column - 1).clamp(min=0)
        )
        return super().__call__(query, key, value, shifted)


@pytest.mark.parametrize("kernel", [Unmasked, OneTooMany])
def test_wrong_attention_alone_is_left_out(
    kernel: type[DenseSubset], as_on_a_gpu, single: ParallelState, monkeypatch, capsys
):
    monkeypatch.setattr(check, "attend_subset", kernel(Log()))
    sound = with_sound_kernels(*spec_and_plan(), 2, single)
    assert sound.model.compile and not sound.model.flex_attention
    told = capsys.readouterr().err
    assert told.startswith("warning: attention of token subsets: plain kernels")
    assert "attention of tokens 0::4 over 1 of 4 subsets, strict" in told


def test_nothing_to_compile_with(as_on_a_gpu, single: ParallelState, monkeypatch, capsys):
    monkeypatch.setattr(compiled_kernels, "compile_fault", lambda: "there is no C compiler")
    assert not with_sound_kernels(*spec_and_plan(), 2, single).model.compile
    assert "(rank 0: there is no C compiler)" in capsys.readouterr().err


def test_a_cpu_and_no_compile_ask_nothing(single: ParallelState, monkeypatch, capsys):
    never: Callable = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(compiled_kernels, "_faults", never)
    spec, plan = spec_and_plan()
    assert with_sound_kernels(spec, plan, 2, single) is spec
    monkeypatch.setattr(choice, "on_gpu", lambda device: True)
    plain = Tiny(extra={"compile": False}).spec(MAP)
    assert with_sound_kernels(plain, plan, 2, single) is plain
    assert capsys.readouterr() == ("", "")


def choice_of_ranks(state: ParallelState, layout: Layout) -> tuple[bool, bool]:
    """Rank 1 has no compiler."""
    wrong = ["there is no C compiler"] if state.rank == 1 else []
    with (
        mock.patch.object(choice, "on_gpu", lambda device: True),
        mock.patch.object(compiled_kernels, "_faults", lambda use: (wrong, [])),
        mock.patch.object(compiled_kernels, "kernels_in_use", lambda *_: None),
    ):
        model = with_sound_kernels(*spec_and_plan(), 2, state).model
    return model.compile, model.flex_attention


def test_ranks_choose_alike(world: World):
    assert set(world.run(choice_of_ranks, Layout(data=2))) == {(False, True)}


def test_more_shapes_than_torch_compiles(monkeypatch: pytest.MonkeyPatch):
    """A fall-back to full scores is an error that names the way out."""

    def full(*_: object, **__: object) -> None:
        raise subset_attention.FailOnRecompileLimitHit("recompile_limit reached")

    monkeypatch.setattr(subset_attention, "_kernel", lambda: full)
    mask = subset_attention.subset_mask(128, 2, 0, True, 1, torch.device("cpu"))
    x = torch.zeros(1, 1, 64, 16)
    with pytest.raises(Exception, match="--no-flex-attention"):
        subset_attention.attend_subset(x, x, x, mask)


def test_memory_that_runs_out_is_no_fault_of_a_kernel(as_on_a_gpu, single, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(norm, "norm_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        with_sound_kernels(*spec_and_plan(), 2, single)
