"""The engine on tensor-parallel ranks: rank 0 decides, the others follow; the tokens and logits are
those of one rank."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_kvshare.config import ParallelConfig
from megatron_kvshare.megatron_api.linear import read_for_few_rows
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.load import new_cache
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.serving.worker import Worker
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from tests.distributed.world import Layout, World
from tests.product import Tiny, load_by_name
from tests.serving import Recorder, ask, greedy, prompts_of

TINY = Tiny()
SETTINGS = EngineSettings(
    page_size=4, max_length=64, cache_tokens=40, prefill_tokens=7, kv_prefill="exact"
)


class Answered(NamedTuple):
    tokens: list[list[int]]
    logits: list[Tensor]
    cache_bytes: int


def answer(state: ParallelState, layout: Layout, sharing: SharingMap) -> Answered | None:
    """What rank 0 says; None on the others, once it has closed."""
    parallel = ParallelConfig(tensor_model_parallel_size=layout.tensor)
    model = TINY.model(sharing, state, parallel=parallel).eval()
    load_by_name(model, TINY.weights(sharing))
    read_for_few_rows(model.parameters())
    runner = Recorder(Worker(model, new_cache(model, SETTINGS, state)), state)
    if not state.is_first:
        runner.follow()
        return None
    engine = Engine(model.spec, runner, SETTINGS)
    tokens = ask(engine, prompts_of((3, 13, 8, 17), TINY.vocabulary), greedy(8))
    engine.close()
    assert engine.stats().preempted > 0
    return Answered(
        tokens, [torch.stack(rows) for rows in runner.logits.values()], runner.cache_bytes
    )


@pytest.mark.parametrize(
    ("tp", "kv_map"),
    [
        (2, "sandwich-top"),
        pytest.param(2, "windowed", marks=pytest.mark.nightly),
        (4, "sandwich-top"),  # more ranks than KV heads
        pytest.param(4, "standard", marks=pytest.mark.nightly),
    ],
)
def test_ranks_answer_as_one(tp: int, kv_map: str, single, world: World) -> None:
    maps = {
        "sandwich-top": build_map(8, "sandwich-top", 3),
        "windowed": build_map(8, kv_map="0s_4_4s_4_4s_0s_7s_7"),
        "standard": build_map(4, "standard"),
    }
    alone = answer(single, Layout(), maps[kv_map])
    together, *others = world.run(answer, Layout(tensor=tp), maps[kv_map])
    assert others == [None] * (tp - 1)
    assert together.tokens == alone.tokens
    for got, wanted in zip(together.logits, alone.logits, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert together.cache_bytes * min(tp, TINY.kv_heads) == alone.cache_bytes
