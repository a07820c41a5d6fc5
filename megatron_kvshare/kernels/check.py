"""Whether compiled kernels compute on this device what they stand for: asked before a run trusts
them.

What a compiler makes depends on the card, the driver and the versions of torch and Triton, and a
wrong gradient shows in no loss for days. So values and gradients of every kernel that a run is
going to use are compared with its formula, written out in plain fp32 operations, at the widths of
the run. It costs little besides the compilation, which the run then need not wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from megatron_kvshare.kernels import heads
from megatron_kvshare.kernels.gated_silu import gated_silu
from megatron_kvshare.kernels.heads import Heads
from megatron_kvshare.kernels.norm import add_rms_norm, rms_norm
from megatron_kvshare.kernels.subset_attention import attend_subset, subset_mask

Tensor = torch.Tensor
Operation = Callable[..., tuple[Tensor, ...]]

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative norm of a difference: rounding stays well below, a wrong formula does not."""
TOKENS = 131
"""Of a trial of what works token by token: no multiple of any tile."""
ROWS = 64
"""Queries whose attention is written out, over all of their keys."""


class Use(NamedTuple):
    """What the kernels of a rank meet.

    ``ffn``: this rank's part. ``splits``: the heads that projections are split into. ``strides``:
    of the token subsets that one kernel reads, in ``batch`` sequences of ``length`` tokens.
    """

    device: torch.device
    dtype: torch.dtype
    hidden: int
    ffn: int
    epsilon: float
    head_dim: int
    splits: tuple[tuple[Heads, ...], ...]
    query_heads: int
    kv_heads: int
    batch: int
    length: int
    strides: tuple[int, ...]


class _Trial(NamedTuple):
    """A kernel, what it stands for, and the shapes of what both take."""

    name: str
    kernel: Operation
    formula: Operation
    shapes: tuple[tuple[int, ...], ...]


def fused_faults(use: Use) -> list[str]:
    """What is wrong with norms, SwiGLU and rotation, each fault in a line; empty: nothing."""
    return _faults(_fused(use), use)


def subset_attention_faults(use: Use) -> list[str]:
    """The same of the attention of token subsets."""
    return _faults(_subset_attention(use), use)


def _faults(trials: Iterable[_Trial], use: Use) -> list[str]:
    found = (_fault(trial, use) for trial in trials)
    return [fault for fault in found if fault is not None]


def _fault(trial: _Trial, use: Use) -> str | None:
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(shape, generator=generator) for shape in trial.shapes)
    inputs = [x.to(use.device, use.dtype) for x in drawn]
    try:
        got = _with_gradients(trial.kernel, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers end with errors of many kinds
        reason = next(iter(str(error).splitlines()), "")
        return f"{trial.name}: {type(error).__name__}: {reason}"
    wanted = _with_gradients(trial.formula, [x.float() for x in inputs])
    off = max(map(_difference, got, wanted))
    if off <= LIMITS[use.dtype]:
        return None
    return f"{trial.name}: {off:.1e} off its formula, where rounding is below {LIMITS[use.dtype]}"


def _with_gradients(operation: Operation, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all inputs for the same gradients of outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = operation(*leaves)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    if inputs[0].is_cuda:
        torch.cuda.synchronize(inputs[0].device)  # what a kernel breaks shows now
    return [x.detach() for x in found]


def _difference(x: Tensor, wanted: Tensor) -> float:
    off = float((x.float() - wanted).norm() / wanted.norm())
    return off if off == off else float("inf")


def _fused(use: Use) -> Iterator[_Trial]:
    hidden, weight = (TOKENS, 2, use.hidden), (use.hidden,)

    def norm(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (rms_norm(x, weight, use.epsilon, True),)

    def norm_formula(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (x * (x.square().mean(-1, keepdim=True) + use.epsilon).rsqrt() * weight,)

    def add_norm(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, more, weight, use.epsilon, True)

    def add_norm_formula(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + more, *norm_formula(x + more, weight)

    def swiglu(x: Tensor) -> tuple[Tensor]:
        return (gated_silu(x, True),)

    def swiglu_formula(x: Tensor) -> tuple[Tensor]:
        gate, up = x.chunk(2, dim=-1)
        return (gate * gate.sigmoid() * up,)

    yield _Trial("RMSNorm", norm, norm_formula, (hidden, weight))
    yield _Trial("sum and RMSNorm", add_norm, add_norm_formula, (hidden, hidden, weight))
    yield _Trial("SwiGLU", swiglu, swiglu_formula, ((TOKENS, 2, 2 * use.ffn),))
    for parts in use.splits:
        yield _split(use, parts)


def _split(use: Use, parts: tuple[Heads, ...]) -> _Trial:
    """Of queries, keys and values together or apart."""
    frequencies = torch.logspace(0, -4, use.head_dim // 2)
    angles = torch.outer(torch.arange(TOKENS), frequencies).to(use.device)
    cos, sin = (table.to(use.dtype) for table in (angles.cos(), angles.sin()))
    tables = (torch.cat((cos, cos), -1)[None, None], torch.cat((-sin, sin), -1)[None, None])

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return heads.split_heads(x, use.head_dim, parts, tables, True)

    def formula(x: Tensor) -> tuple[Tensor, ...]:
        by_head = x.unflatten(-1, (-1, use.head_dim))
        outputs, first = [], 0
        for part in parts:
            own = by_head[:, :, first : first + part.count]
            outputs.append(rotated(own) if part.rotated else own)
            first += part.count
        return tuple(outputs)

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        c, s = (table.float()[:, None, None] for table in (cos, sin))
        return torch.cat((a * c - b * s, a * s + b * c), dim=-1)

    width = use.head_dim * sum(part.count for part in parts)
    return _Trial(f"split into {len(parts)} and rotate", split, formula, ((TOKENS, 2, width),))


def _subset_attention(use: Use) -> Iterator[_Trial]:
    """Of each stride a first and a last subset, over one and over all, in both orders."""
    for stride in use.strides:
        for offset, known in ((0, 1), (stride - 1, stride)):
            for strict in (True, False):
                yield _attention(use, stride, offset, known, strict)


def _attention(use: Use, stride: int, offset: int, known: int, strict: bool) -> _Trial:
    tokens = torch.arange(use.length, device=use.device)
    queries = tokens[offset::stride]
    keys = torch.cat([tokens[subset::stride] for subset in range(known)])
    rows = torch.linspace(0, len(queries) - 1, min(ROWS, len(queries)), device=use.device).long()
    seen = keys < queries[rows, None] + (0 if strict else 1)
    mask = subset_mask(use.length, stride, offset, strict, known, use.device)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return (attend_subset(query, key, value, mask)[:, :, rows],)

    def formula(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        repeat = partial(torch.repeat_interleave, repeats=use.query_heads // use.kv_heads, dim=1)
        scores = query[:, :, rows] @ repeat(key).mT * use.head_dim**-0.5
        weights = scores.masked_fill(~seen, -1e30).softmax(-1).masked_fill(~seen, 0.0)
        return (weights @ repeat(value),)

    source = (use.batch, use.kv_heads, len(keys), use.head_dim)
    shapes = ((use.batch, use.query_heads, len(queries), use.head_dim), source, source)
    name = f"attention of tokens {offset}::{stride} over {known} of {stride} subsets"
    return _Trial(name + (", strict" if strict else ""), kernel, formula, shapes)
