"""Fused operations: what a GPU compiles computes what the CPU's forms compute.

By default the formulas run as plain torch, `-m nightly` compiles them by inductor's CPU backend:
that proves the formulas and what inductor makes of them, not Triton's code, which `-m gpu` runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_kvshare.kernels import choice, compiling, gated_silu, heads, norm
from megatron_kvshare.kernels.heads import Heads

MODULES = (gated_silu, heads, norm)
HIDDEN, HEAD_DIM = 48, 8
PARTS = (Heads(4, rotated=True), Heads(1, rotated=True), Heads(1, rotated=False))
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Relative norm of a difference; the CPU's forms round what is between to bf16."""

each_type = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def norm_of(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (norm.rms_norm(x, weight, 1e-5, True),)


def norm_of_sum(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return norm.add_rms_norm(x, more, weight, 1e-5, True)


def swiglu(x: Tensor) -> tuple[Tensor, ...]:
    return (gated_silu.gated_silu(x, True),)


def rotated(x: Tensor) -> tuple[Tensor, ...]:
    angles = torch.outer(torch.arange(len(x)), torch.logspace(0, -2, HEAD_DIM // 2)).to(x.device)
    cos, sin = angles.cos(), angles.sin()
    table = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    first, second = (t[None, None].to(x.dtype) for t in table)
    return heads.split_heads(x, HEAD_DIM, PARTS, (first, second), True)


OPERATIONS: dict[Callable[..., tuple[Tensor, ...]], int] = {
    norm_of: 1,
    norm_of_sum: 2,
    swiglu: 1,
    rotated: 1,
}
"""How many tensors ``[s, b, 48]`` each takes; norms take a weight as well."""

each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)


def inputs_of(operation: Callable, tokens: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, batch, HIDDEN)] * OPERATIONS[operation]
    shapes += [(HIDDEN,)] if operation in (norm_of, norm_of_sum) else []
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(operation: Callable, inputs: list[Tensor], device: str = "cpu") -> list[Tensor]:
    leaves = [x.to(device).requires_grad_() for x in inputs]
    outputs = operation(*leaves)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    return [x.detach().cpu() for x in found]


def assert_near(got: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert float((x.double() - y.double()).norm() / y.double().norm()) < limit


def wanted_of(operation: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """By the CPU's forms in fp64 or, where they compute in it whatever they get, fp32."""
    wide = torch.float32 if operation in (norm_of, norm_of_sum) else torch.float64
    found = with_gradients(operation, [x.to(wide) for x in inputs])
    return [x.to(inputs[0].dtype) for x in found]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_compiled", lambda device, wanted: wanted)


@pytest.fixture
def uncompiled(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the formulas that are run, as plain torch."""
    ran: list[str] = []

    def plain(formula: Callable) -> Callable:
        ran.append(formula.__name__)
        return formula

    for module in MODULES:
        monkeypatch.setattr(module, "compiled", plain)
    return ran


@each_type
@each_operation
def test_formulas(operation, dtype, request: pytest.FixtureRequest):
    inputs = inputs_of(operation, 7, 3, dtype)
    wanted = wanted_of(operation, inputs)
    ran = request.getfixturevalue("uncompiled")
    assert_near(with_gradients(operation, inputs), wanted, LIMITS[dtype])
    assert [name.rpartition("_")[2] for name in ran] == ["forward", "backward"]


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor's CPU backend needs g++")
@each_operation
def test_compiled_on_a_cpu(operation, compilations, request: pytest.FixtureRequest):
    """Once forward and once backward, whatever the number of tokens and whoever needs gradients;
    rotation once more for the batch of one that torch treats as another kind."""
    cases = [(inputs_of(operation, *size, torch.bfloat16)) for size in SIZES]
    wanted = [wanted_of(operation, inputs) for inputs in cases]
    request.getfixturevalue("as_on_a_gpu")
    for inputs, expected in zip(cases, wanted, strict=True):
        assert_near(with_gradients(operation, inputs), expected, LIMITS[torch.bfloat16])
        with torch.no_grad():
            found = [x.detach() for x in operation(*inputs)]
            assert_near(found, expected[: len(found)], LIMITS[torch.bfloat16])
    assert compilations() == (4 if operation is rotated else 2)


SIZES = [(64, 2), (16, 2), (17, 2), (33, 4), (128, 3), (9, 5), (11, 6), (12, 7), (40, 1)]


@pytest.mark.gpu
@each_type
@each_operation
def test_compiled_on_a_gpu(operation, dtype):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    assert compiling.compile_fault() is None
    for size in SIZES:
        inputs = inputs_of(operation, *size, dtype)
        wanted = wanted_of(operation, inputs)
        assert_near(with_gradients(operation, inputs, "cuda"), wanted, LIMITS[dtype])


def test_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(choice, "compile_fault", lambda: None)
    assert choice.is_compiled(cuda, True)
    assert not choice.is_compiled(cuda, False) and not choice.is_compiled(cpu, True)
    monkeypatch.setattr(choice, "compile_fault", lambda: "there is no C compiler")
    assert not choice.is_compiled(cuda, True)


def test_what_compiling_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Triton, a C compiler and Python's headers, the first that is missing."""
    fault = compiling.compile_fault.__wrapped__
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: True)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    assert fault() is None
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in fault()
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert "C compiler" in fault()
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: False)
    assert "Triton" in fault()
