"""Every route of attention on a GPU: logits, loss and all gradients, at lengths of real runs.

With `-m gpu` on a GPU; elsewhere the same code runs on the CPU with stand-ins for the GPU's kernels
(`tests/gpu_kernels.py`). A run in bf16 is compared with one in fp32 that reads masks only, and must
be as near to it as bf16 is with masks: whatever the blocks do, rounding is all that may differ.
fp32 never takes blocks on a GPU (flash attention has none): there the comparison is with the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model import context
from tests.distributed.world import Layout, World
from tests.gpu_kernels import Log, on_gpu_route, on_one_kernel_route
from tests.parity.gpu_cases import (
    CASES,
    CHOICES,
    MASKED,
    Case,
    Computed,
    compute,
    compute_in_fp32,
    pairs_of,
)
from tests.product import relative_differences

BF16, TIMES_MASKED, FP32 = 2e-2, 3.0, 1e-4
"""Largest relative norm of a difference to fp32, in bf16; over that of masks; of fp32 on a GPU."""


SHORT = 64
"""Queries from which blocks are read in short runs on the CPU, in place of 512."""


def first_of_each(*settings: str) -> set[Case]:
    """Of the cases that read blocks, the first with each combination of some settings."""
    first: dict[tuple[str, ...], Case] = {}
    for case in CASES:
        if case.reads_blocks:
            first.setdefault(tuple(getattr(case, name) for name in settings), case)
    return set(first.values())


EVERY_CHANGE = first_of_each("recipe", "route")
PLACES = [
    pytest.param(
        case,
        "cpu",
        id=f"cpu-{case}",
        marks=[] if case in EVERY_CHANGE else pytest.mark.nightly,
    )
    for case in CASES
] + [
    pytest.param(case, device, id=f"{device.replace('cuda', 'gpu')}-{case}", marks=pytest.mark.gpu)
    for device in ("cuda", "cuda, compiled")
    for case in CASES
]


@contextlib.contextmanager
def route(state: ParallelState) -> Iterator[Log | None]:
    """The GPU's kernels, or on the CPU what stands for them."""
    with contextlib.nullcontext() if state.platform.is_gpu else on_gpu_route() as log:
        yield log


def skip_elsewhere(device: str, state: ParallelState) -> None:
    if state.platform.device.type != device:
        pytest.skip(f"this process runs on {state.platform.device}")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=() if c.reads_blocks else pytest.mark.nightly, id=str(c))
        for c in CASES
    ],
)
def test_short_texts(case: Case, single: ParallelState, monkeypatch: pytest.MonkeyPatch):
    skip_elsewhere("cpu", single)
    monkeypatch.setattr(context, "BLOCKWISE_FROM", SHORT)
    assert_bf16_is_fp32_but_for_rounding(case, single)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=() if c in EVERY_CHANGE else pytest.mark.nightly, id=str(c))
        for c in CASES
        if c.reads_blocks
    ],
)
def test_short_texts_in_one_kernel(
    case: Case, single: ParallelState, monkeypatch: pytest.MonkeyPatch
):
    """Where kernels can be compiled, a subset reads all known keys at once."""
    skip_elsewhere("cpu", single)
    monkeypatch.setattr(context, "BLOCKWISE_FROM", SHORT)
    with on_one_kernel_route() as log:
        got = compute(single, case, bf16=True)
    assert log["one_kernel"] and not log["flash_forward"]
    assert_near_fp32(got, case, single)


@pytest.mark.parametrize(("case", "device"), PLACES)
def test_texts_of_real_runs(case: Case, device: str, single: ParallelState):
    kind, _, compiled = device.partition(", ")
    skip_elsewhere(kind, single)
    assert case.length >= 2047 or case.route == "masks"
    assert_bf16_is_fp32_but_for_rounding(case, single, bool(compiled))


def assert_bf16_is_fp32_but_for_rounding(
    case: Case, single: ParallelState, compiled: bool = False
) -> None:
    with route(single) as log:
        got = compute(single, case, bf16=True, compiled=compiled)
    if log is not None:
        assert bool(log["flash_backward"]) == case.reads_blocks
    assert_near_fp32(got, case, single)


def assert_near_fp32(got: Computed, case: Case, single: ParallelState) -> None:
    with route(single):
        masked = compute(single, case, bf16=True, masks_only=True)
    expected = compute(single, case, bf16=False, masks_only=True)
    wanted = {"logits": expected.logits, "loss": expected.loss, **expected.gradients}
    differences, of_masks = (
        relative_differences({"logits": x.logits, "loss": x.loss, **x.gradients}, wanted)
        for x in (got, masked)
    )
    limits = {name: min(BF16, TIMES_MASKED * off) for name, off in of_masks.items()}
    # A scalar that happens to be right to the last bit says nothing about rounding.
    limits["loss"] = TIMES_MASKED * of_masks["logits"]
    over = {n: (off, limits[n]) for n, off in differences.items() if not off <= limits[n]}
    assert not over, f"difference and limit: {over}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[:: len(CASES) // 4], ids=str)
def test_fp32_equals_the_cpu(case: Case, single: ParallelState, world: World):
    skip_elsewhere("cuda", single)
    got = compute(single, case, bf16=False)
    (cpu,) = world.run(compute_in_fp32, Layout(), case)
    wanted = {"logits": cpu.logits, "loss": cpu.loss, **cpu.gradients}
    found = relative_differences({"logits": got.logits, "loss": got.loss, **got.gradients}, wanted)
    assert all(off <= FP32 for off in found.values()), found


def test_cases_hold_every_pair_that_can_be():
    held = set().union(*map(pairs_of, CASES))
    possible = {
        ((one, x), (other, y))
        for one, other in itertools.combinations(CHOICES, 2)
        for x, y in itertools.product(CHOICES[one], CHOICES[other])
        if not (one == "route" and x != "masks" and y in MASKED)
    }
    assert held == possible
    assert {case.reads_blocks for case in CASES} == {True, False}
