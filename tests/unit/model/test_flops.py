"""The count of FLOPs against the matrix products that the modules of every stage really run."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.costs.work import head_work, segment_work
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.block import StageTensors
from megatron_kvshare.model.gpt import KVShareGPT, build_stages
from megatron_kvshare.model.kv import KV
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES, Recipe, solver_plan
from megatron_kvshare.stages.placement import Placement
from tests.product import Tiny
from tests.recipes import jacobi, strided

LENGTH = 22  # not a multiple of any stride: the token subsets are of two sizes
TINY = Tiny(vocabulary=48, window=5, extra={"kv_channels": 6, "seq_length": LENGTH})  # no padding
MAPS = {
    "standard": (build_map(8), [(8,), (3, 5)]),
    "bottom": (build_map(8, "pizza-bottom", 3), [(1, 4, 3)]),
    "windowed": (SharingMap.parse("0_0s_2s_2_4s_4s_0_7"), [(2, 4, 2)]),
    "upward": (build_map(8, "sandwich-top", 3), [(8,), (1, 7)]),
    "two groups": (SharingMap.parse("0_2_2_2_6_6_6_2"), [(1, 3, 4)]),
    "windowed upward": (SharingMap.parse("0_4s_4_0s_4s_0"), [(6,)]),
}
RECIPE_CASES = {
    **RECIPES,
    "jacobi(2, 2)": jacobi(2, 2),
    "jacobi(0, 2) from the input": jacobi(0, 2, "input"),
    "strided(3; 0, 2)": strided(3, 0, 2),
    "strided(4; 2, 1)p": strided(4, 2, 1, p=True),
}
CASES = {
    f"{name}, {layout}, {recipe}": (map, layout, RECIPE_CASES[recipe])
    for name, (map, layouts) in MAPS.items()
    for layout in layouts
    for recipe in (RECIPE_CASES if map.is_cyclic else ["two-sweep"])
}
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Products(TorchDispatchMode):
    """FLOPs of what torch runs: those of matrix products by torch's own formulas; those of
    attention for the pairs that its kernel is told to look at, twice as many in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out, op = func(*args, **kwargs), func.overloadpacket
        if op is ATTENTION:
            query, key = args[:2]
            causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
            self.flops["attention"] += _attention(query, key, causal, kwargs.get("attn_mask"))
        elif op is ATTENTION_BACKWARD:
            query, key, causal = args[1], args[2], args[7]
            forward = _attention(query, key, causal, kwargs.get("attn_mask"))
            self.flops["attention"] += 2 * forward
        elif op in flop_registry:
            self.flops["linear"] += flop_registry[op](*args, **kwargs, out_val=out)
        return out


def _attention(
    query: torch.Tensor, key: torch.Tensor, causal: bool, mask: torch.Tensor | None
) -> int:
    """Scores and values: two products as wide as a head for every pair."""
    batch, heads, queries, width = query.shape
    seen = torch.ones(queries, key.shape[2], dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = mask.isfinite()[0, 0]
        # A first query that sees nothing is given every key, so that the kernel makes no NaN.
        sees_all = seen.all(-1)
        seen &= ~(sees_all & ~_up_to_the_end(sees_all)).unsqueeze(-1)
    return 2 * 2 * batch * heads * width * int(seen.sum())


def _up_to_the_end(flags: torch.Tensor) -> torch.Tensor:
    return flags.flip(0).cumprod(0).flip(0).bool()


class Measured(NamedTuple):
    forward: Counter[str]
    backward: Counter[str]


def run(model: KVShareGPT, entering: StageTensors | None) -> tuple[Measured, StageTensors | None]:
    """FLOPs of one sequence, and what the next stage needs."""
    tokens = torch.randint(48, (1, LENGTH))
    with Products() as forward:
        output = model(tokens, tokens, entering=entering and _leaves(entering))
    made = [output.loss] if output.leaving is None else _tensors(output.leaving)
    with Products() as backward:
        torch.autograd.backward([each.sum() for each in made])
    return Measured(forward.flops, backward.flops), output.leaving


def _tensors(stage: StageTensors) -> list[torch.Tensor]:
    return [stage.hidden, *(each for kv in stage.kv.values() for each in kv)]


def _leaves(stage: StageTensors) -> StageTensors:
    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_()

    kv = {layer: KV(leaf(each.key), leaf(each.value)) for layer, each in stage.kv.items()}
    return StageTensors(leaf(stage.hidden), kv)


@pytest.mark.parametrize(("map", "layout", "recipe"), CASES.values(), ids=CASES)
def test_every_stage_runs_what_is_counted(
    map: SharingMap, layout: tuple[int, ...], recipe: Recipe, single: ParallelState
) -> None:
    spec = TINY.but(untied=not map.is_cyclic and len(layout) > 1).spec(map)
    plan = solver_plan(map, recipe)
    stages = Placement(map, layout, len(layout)).stages
    entering = None
    for stage, model in zip(
        stages, build_stages(spec, ParallelConfig(), plan, stages, single), strict=True
    ):
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        measured, entering = run(model, entering)
        work = [
            each
            for segment in plan.within(stage.layers)
            for each in segment_work(spec.shape, map, segment)
        ]
        work += [head_work(spec.shape)] * stage.predicts
        assert measured.forward.total() == sum(each.forward for each in work)
        assert measured.backward.total() == sum(each.backward for each in work)
