"""Compiled kernels at the start of a run: made, checked, and left out where they are not right."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.kernels import check, choice
from megatron_kvshare.kernels.compiling import compile_fault
from megatron_kvshare.kernels.heads import Heads
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects
from megatron_kvshare.model.context import BLOCKWISE_FROM, subset_kernel
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.output import say
from megatron_kvshare.sharing.plan import ExecutionPlan, subset_length
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.train.agreement import warn

_SHOWN = 3
"""Faults in a warning."""


def with_sound_kernels(
    spec: ModelSpec, plan: ExecutionPlan, micro_batch_size: int, state: ParallelState
) -> ModelSpec:
    """``spec``, with the compiled kernels of ``plan`` proven on every rank and those left out that
    are wrong on one: plain ones run in their place, and the user is told.

    Raises:
        ConfigError: a kernel broke the device, where nothing can run any more in this process.
    """
    device, model = state.platform.device, spec.model
    if not (model.compile and choice.on_gpu(device)):
        return spec
    if state.is_first:
        say("Compiling kernels and checking them: up to a minute, less once they are cached.")
    start = time.monotonic()
    faults = gather_objects(_faults(kernels_in_use(spec, plan, micro_batch_size, state)))
    fused, attention = (_by_rank(each) for each in zip(*faults, strict=True))
    if state.is_first:
        say(f"Compiled kernels checked in {time.monotonic() - start:.0f} s.")
    warn(state, *_left_out("norms, SwiGLU and rotation", "--no-compile", fused))
    warn(state, *_left_out("attention of token subsets", "--no-flex-attention", attention))
    is_sound = {"compile": not fused, "flex_attention": model.flex_attention and not attention}
    return replace(spec, model=replace(model, **is_sound))


def _faults(use: check.Use) -> tuple[list[str], list[str]]:
    """Of fused operations and of attention, on this rank."""
    missing = compile_fault()
    if missing is not None:
        return [missing], []
    fused = check.fused_faults(use)
    attention = check.subset_attention_faults(use)
    if fused or attention:
        _require_working_device(use.device, (fused + attention)[0])
    if use.device.type == "cuda":  # the run's own peak is logged
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(use.device)
    return fused, attention


def kernels_in_use(
    spec: ModelSpec, plan: ExecutionPlan, micro_batch_size: int, state: ParallelState
) -> check.Use:
    """What the kernels of this rank meet in training."""
    model = spec.model
    layout = HeadLayout.of(model, state.tp_rank, state.tp_size)
    queries = Heads(layout.local_query_heads, rotated=True)
    whole = () if layout.kv_heads_are_split else ((queries, *layout.kv_parts),)
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    has_kernel = subset_kernel(spec, state.platform.device, dtype)
    strides = {sweep.stride for segment in plan.segments for sweep in segment.sweeps} - {1}
    return check.Use(
        device=state.platform.device,
        dtype=dtype,
        hidden=model.hidden_size,
        ffn=spec.shape.ffn_hidden_size // state.tp_size,
        epsilon=model.norm_epsilon,
        head_dim=model.head_dim,
        splits=(*whole, (queries,), layout.kv_parts),
        query_heads=layout.local_query_heads,
        kv_heads=layout.local_kv_heads,
        batch=micro_batch_size,
        length=model.seq_length,
        strides=tuple(
            stride
            for stride in sorted(strides)
            if has_kernel and subset_length(model.seq_length, stride, 0) >= BLOCKWISE_FROM
        ),
    )


def _require_working_device(device: torch.device, fault: str) -> None:
    """After an illegal access every call on the device fails, communication too: this rank ends,
    and its launcher ends the others."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        rule = f"a compiled kernel broke the device: {reason}"
        fix = "start again with --no-compile, or with --no-flex-attention if attention is named"
        raise ConfigError(Fault("--compile", fault, rule, fix)) from error


def _by_rank(faults: tuple[list[str], ...]) -> list[str]:
    """Each fault once, with the first rank that has it."""
    first: dict[str, int] = {}
    for rank, each in enumerate(faults):
        for fault in each:
            first.setdefault(fault, rank)
    return [f"rank {rank}: {fault}" for fault, rank in first.items()]


def _left_out(what: str, flag: str, faults: list[str]) -> list[str]:
    """The warning, where there is something to warn of."""
    if not faults:
        return []
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    found = "; ".join(faults[:_SHOWN]) + more
    return [
        f"{what}: plain kernels run in place of compiled ones, slower ({found})."
        f" {flag} asks for that without a check"
    ]
