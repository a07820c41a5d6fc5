"""How a prompt is run (no torch): the sweeps of each mode, and what the last token alone needs."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from megatron_kvshare.serving.settings import PrefillMode
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import ExecutionPlan, LayerStep, Segment, StepMode
from megatron_kvshare.sharing.solver import (
    CONVERGED_PREFILL,
    EXACT_RESIDUAL_BF16,
    EXACT_RESIDUAL_FP32,
    exact_plan,
    solver_plan,
)
from megatron_kvshare.spec.model_spec import ModelSpec


class PrefillPlan(NamedTuple):
    """``whole`` runs for all tokens of a prompt and makes every key and value. The layers from
    ``tail`` on run for its last token alone; the first of them has its keys and values already
    where ``tail_kv_given``."""

    whole: ExecutionPlan
    tail: int
    tail_kv_given: bool


def is_final(map: SharingMap, mode: PrefillMode) -> bool:
    """Whether keys and values of a prompt are the same, or as good, whatever follows: then it can
    be cut into chunks, and others can begin with what is there."""
    return mode != "trained" or not map.is_cyclic


def prefill_plan(
    spec: ModelSpec, mode: PrefillMode, length: int, bf16: bool, every_token: bool = False
) -> PrefillPlan:
    """For ``length`` tokens; ``every_token``: the log-probabilities of the prompt are asked for, so
    no layer can be left to its last token."""
    plan = _sweeps(spec, mode, length, bf16)
    if every_token:
        return PrefillPlan(plan, spec.map.num_layers, False)
    return _cut(plan)


def _sweeps(spec: ModelSpec, mode: PrefillMode, length: int, bf16: bool) -> ExecutionPlan:
    match mode:
        case "trained":
            return solver_plan(spec.map, spec.recipe.for_length(length))
        case "converged":
            return solver_plan(spec.map, CONVERGED_PREFILL.for_length(length))
        case "exact":
            residual = EXACT_RESIDUAL_BF16 if bf16 else EXACT_RESIDUAL_FP32
            return exact_plan(spec.map, length, residual)


def _cut(plan: ExecutionPlan) -> PrefillPlan:
    """Above the last producer nothing is made that another token reads."""
    top = max(plan.map.producers)
    place = next(n for n, part in enumerate(plan.segments) if part.first <= top <= part.last)
    below, part = plan.segments[:place], plan.segments[place]
    if part.is_cyclic:
        *earlier, last = part.sweeps
        given = bool(last.finish) and part.last == top
        if given:
            part = replace(part, sweeps=(*earlier, replace(last, finish=())))
        whole = ExecutionPlan(plan.map, (*below, part))
        return PrefillPlan(whole, top if given else part.last + 1, given)
    (sweep,) = part.sweeps
    steps = [LayerStep(layer) for layer in range(part.first, top)]
    visit = replace(part.only_visit, steps=(*steps, LayerStep(top, StepMode.KV_ONLY)))
    segment = Segment(part.first, top, (replace(sweep, visits=(visit,)),))
    return PrefillPlan(ExecutionPlan(plan.map, (*below, segment)), top, True)
