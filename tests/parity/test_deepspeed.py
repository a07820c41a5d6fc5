"""What the DeepSpeed engine does besides training, on one process: steps that change nothing,
evaluations in between, and when ZeRO 3 has which weights whole."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from megatron_kvshare.engines import deepspeed
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.megatron_api.layers import ColumnParallel
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.attention import SharedKVAttention
from megatron_kvshare.model.parameters import gather_by_name
from megatron_kvshare.pipeline.runner import Pass
from megatron_kvshare.train.evaluation import evaluate
from megatron_kvshare.train.run import Orders, Run
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.step import train_step
from tests.distributed.jobs import Case
from tests.distributed.world import Layout
from tests.maps import named_maps
from tests.zero import settings_of

CASE = Case(
    sharing={"kv_map": named_maps(4)["lasagna-top.l1"].notation},
    model={"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48},
    train={"micro_batch_size": 2, "clip_grad": 0.7, "eval_iters": 1},
)


def prepared(state: ParallelState, stage: int | None = None, case: Case = CASE) -> Run:
    """None: by the megatron engine."""
    if stage is not None:
        settings = settings_of(stage)
        case = replace(case, deepspeed=settings)
    return prepare(case.planned(Layout()), state)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    with run.engine.whole_weights():
        return gather_by_name(run.engine.stages, run.state)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, each in wanted.items():
        assert (found[name] - each).norm() <= 1e-5 * each.norm(), name


nightly = partial(pytest.param, marks=pytest.mark.nightly)


@pytest.mark.parametrize("stage", [nightly(0), 1, nightly(2), 3])
def test_a_skipped_step_leaves_no_trace(single: ParallelState, stage: int) -> None:
    """The second of four, taken for a spike: neither weights nor moments nor the next gradients."""
    runs = prepared(single), prepared(single, stage)
    for run in runs:
        batches = run.data.train_batches(0)
        for number in (1, 2, 3, 4):
            before = weights_of(run)
            orders = Orders(loss_limit=0.0 if number == 2 else math.inf)
            assert bool(train_step(run, batches, number, orders).skipped) == (number == 2)
            same = (torch.equal(each, before[name]) for name, each in weights_of(run).items())
            assert all(same) if number == 2 else not all(same)
    assert_close(weights_of(runs[1]), weights_of(runs[0]))
    counted = runs[1].engine.engine
    assert (counted.global_steps, counted.skipped_steps, counted.micro_steps) == (4, 1, 8)
    assert runs[1].engine.shares.updates == 3


@pytest.mark.nightly
def test_bf16_skips_a_step_too(single: ParallelState) -> None:
    """ZeRO 1 and 2, whose gradients in fp32 are kept apart."""
    case = replace(CASE, model={**CASE.model, "bf16": True})
    for stage in (1, 2):
        runs = prepared(single, stage, case), prepared(single, stage, case)
        for run, skipped in zip(runs, (2, None), strict=True):
            batches = run.data.train_batches(0)
            for number in (1, 2, 3) if skipped else (1, 3):
                if number == 3 and not skipped:
                    next(batches), next(batches)
                orders = Orders(loss_limit=0.0 if number == skipped else math.inf)
                train_step(run, batches, number, orders)
        wanted = weights_of(runs[1])
        assert all(torch.equal(each, wanted[name]) for name, each in weights_of(runs[0]).items())


def most_held(run: Run) -> list[int]:
    """Elements of weights that are there when modules begin to run."""
    counts: list[int] = []

    def count(*_: Any) -> None:
        counts.append(sum(weight.numel() for weight in run.engine.weights))

    for module in run.engine.stages[0].modules():
        module.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluations_in_between(single: ParallelState, stage: int) -> None:
    """By other sweeps than those of training, and exactly; ZeRO 3 has part of the weights at a
    time."""
    runs = prepared(single), prepared(single, stage)
    found: list[list[float]] = [[], []]
    most = most_held(runs[1])
    for numbers, run in zip(found, runs, strict=True):
        batches = run.data.train_batches(0)
        for number in (1, 2):
            evaluation = evaluate(run)
            assert evaluation.kv_gap is not None
            numbers += [evaluation.loss, evaluation.loss + evaluation.kv_gap]
            numbers += [train_step(run, batches, number).loss]
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    whole = sum(weight.numel() for weight in runs[0].engine.stages[0].parameters())
    assert max(most) <= whole / 4 if stage == 3 else min(most) == whole


class Uses(NamedTuple):
    """Of the module of a weight in one step: calls, those that backward goes through, and how often
    DeepSpeed gathered the weight."""

    calls: Counter[str]
    with_gradient: Counter[str]
    gathers: Counter[str]


def watched(run: Run) -> Uses:
    uses = Uses(Counter(), Counter(), Counter())
    model = run.engine.stages[0]
    names = {weight: name for name, weight in model.named_parameters()}

    def called(module: torch.nn.Module, _: Any) -> None:
        mine = [names[weight] for weight in module.parameters(recurse=False)]
        mine += ["embedding.weight"] if module is model.output_layer else []  # tied
        uses.calls.update(mine)
        if torch.is_grad_enabled():
            uses.with_gradient.update(mine)

    def counting(gather: Callable[..., Any], weights: Any, **how: Any) -> Any:
        uses.gathers.update(names[each] for each in weights)
        return gather(weights, **how)

    for module in model.modules():
        module.register_forward_pre_hook(called)
    for weight in names:
        weight.all_gather_coalesced = partial(counting, weight.all_gather_coalesced)
    return uses


@pytest.mark.parametrize("recipe", ["one-sweep", "two-sweep"])
def test_weights_are_whole_for_every_use_and_no_longer(single: ParallelState, recipe: str) -> None:
    """Layers of cyclic groups run several times, some of them without gradient or in part: each
    use gathers its weights in forward and, with gradient, in backward."""
    run = prepared(single, 3, replace(CASE, sharing={**CASE.sharing, "kv_recipe": recipe}))
    batches = run.data.train_batches(0)
    train_step(run, batches, 1)
    uses = watched(run)
    train_step(run, batches, 2)
    wanted = uses.calls + uses.with_gradient
    # What is projected at use enters a norm without gradient: nothing tells when backward is done.
    matrices = {name for name in wanted if not name.endswith("norm.weight")}
    assert {name: uses.gathers[name] for name in matrices} == {x: wanted[x] for x in matrices}
    assert len(set(wanted.values())) > 2
    assert not any(weight.numel() for weight in run.engine.weights), "some were not released"


def test_what_recomputation_breaks_off_is_forgotten(single: ParallelState) -> None:
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    recomputed = {"recompute_granularity": "full", "recompute_method": "uniform"}
    model = {**CASE.model, **recomputed, "recompute_num_layers": 1}
    run = prepared(single, 3, replace(CASE, model=model))
    calls = len(FWD_MODULE_STACK)
    train_step(run, run.data.train_batches(0), 1)
    assert len(FWD_MODULE_STACK) == calls
    assert not any(weight.numel() for weight in run.engine.weights), "some were not released"


def saved_tensors(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """All that backward from here keeps."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        yield from (each for each in kept if isinstance(each, torch.Tensor))
        yield from (each for each in getattr(node, "saved_tensors", ()) if each is not None)


@pytest.mark.parametrize("recipe", ["one-sweep", "two-sweep"])
def test_backward_keeps_no_gathered_weight(single: ParallelState, recipe: str) -> None:
    """Neither whole nor by a part of it, as what makes keys and values alone uses it."""
    case = replace(CASE, sharing={**CASE.sharing, "kv_recipe": recipe})
    run = prepared(single, 3, case)
    with run.engine.whole_weights():
        matrices = [each.detach().clone() for each in run.engine.weights if each.dim() == 2]
    output = run.engine.chunk(next(run.data.train_batches(0)), Pass(run.plan))
    held = list(saved_tensors(output.tensor))
    assert len(held) > 100
    held = [each for each in held if each.dim() == 2]
    assert not any(has_rows_of(x, y) or has_rows_of(x.mT, y) for x in held for y in matrices)


def has_rows_of(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    if not tensor.numel() or tensor.shape[1] != weight.shape[1]:
        return False
    return bool((weight == tensor[0]).all(1).any())


def test_what_hooks_do_not_see_is_seen(
    single: ParallelState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projections that hand over an object: ZeRO 3 does not find the tensor in it."""

    @dataclass
    class Bundle:
        inside: torch.Tensor

    class Hidden(ColumnParallel):
        def forward(self, x: torch.Tensor, rows: slice = slice(None)) -> Any:
            return Bundle(super().forward(x, rows))

    plain = SharedKVAttention.__init__

    def built(self: SharedKVAttention, *arguments: Any) -> None:
        plain(self, *arguments)
        self.linear_qkv.__class__ = Hidden

    def opened(name: str) -> None:
        method = getattr(SharedKVAttention, name)

        def with_tensor(self: SharedKVAttention, projected: Any, context: Any) -> Any:
            inside = projected.inside if isinstance(projected, Bundle) else projected
            return method(self, inside, context)

        monkeypatch.setattr(SharedKVAttention, name, with_tensor)

    monkeypatch.setattr(SharedKVAttention, "__init__", built)
    for name in ("_heads_of", "_kv_of", "_query_of"):
        opened(name)
    train_step(run := prepared(single, 2), run.data.train_batches(0), 1)
    run = prepared(single, 3)
    with pytest.raises(RuntimeError):
        train_step(run, run.data.train_batches(0), 1)


def test_tensor_parallelism_is_told_and_sequence_parallelism_is_not() -> None:
    """By these names DeepSpeed would norm each tensor-parallel rank alone, or split its data."""
    told = {name for name in dir(deepspeed.Ranks) if not name.startswith("_")}
    assert "get_tensor_model_parallel_world_size" in told
    assert not [name for name in told if "sequence" in name]


def test_without_deepspeed(single: ParallelState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install megatron_kvshare\[deepspeed\]"):
        deepspeed.imported_deepspeed(single.platform)
