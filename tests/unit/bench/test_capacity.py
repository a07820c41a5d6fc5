"""How many sequences fit: the arithmetic against counting one by one, and against the engine."""

from __future__ import annotations

import pytest

from megatron_kvshare.bench.capacity import (
    Lengths,
    batch_bytes,
    batch_pages,
    largest,
    largest_batch,
)
from megatron_kvshare.serving.cache import PagedCache
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.layout import CacheLayout
from megatron_kvshare.serving.load import new_runner
from megatron_kvshare.serving.request import Request
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.sharing.patterns import build_map
from tests.product import Tiny, load_by_name
from tests.serving import greedy, prompts_of

TINY = Tiny()
MAPS = [
    build_map(4),
    build_map(4, "sandwich-top", 2),
    build_map(8, kv_map="0s_4_4s_4_4s_0s_7s_7"),  # some tokens leave the cache
]
LENGTHS = [Lengths(8, 8), Lengths(3, 4), Lengths(5, 19), Lengths(1, 7)]
PAGE = 4


def layout_of(sharing) -> CacheLayout:
    return CacheLayout.of(TINY.spec(sharing), PAGE, element_bytes=4)


@pytest.mark.parametrize("sharing", MAPS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_largest_batch_fits_and_one_more_does_not(sharing, lengths: Lengths) -> None:
    layout = layout_of(sharing)
    for budget in (0, 5_000, 40_000, 123_456, 1_000_000):
        counted = 0
        while batch_bytes(layout, counted + 1, lengths) <= budget:
            counted += 1
        assert largest_batch(layout, budget, lengths) == counted


def test_half_the_kv_layers_hold_twice_as_many() -> None:
    lengths = Lengths(8, 8)
    whole, half = (layout_of(sharing) for sharing in (build_map(4), build_map(4, "cla:2")))
    budget = 10 * 16 * whole.token_bytes
    assert largest_batch(whole, budget, lengths) == 10
    assert largest_batch(half, budget, lengths) == 20


@pytest.mark.parametrize("sharing", MAPS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_engine_runs_the_whole_batch_at_once(sharing, lengths: Lengths, single) -> None:
    """In these pages none waits for another's end and none is set aside; with a page less of a
    group, one of both happens where no window drops pages."""
    layout, batch = layout_of(sharing), 3
    model = TINY.model(sharing, single).eval()
    load_by_name(model, TINY.weights(sharing))

    def all_at_once(pages: tuple[int, ...]) -> bool:
        cache = PagedCache(
            layout, pages, TINY.config(1).head_dim, model.config.params_dtype, model_device(model)
        )
        settings = EngineSettings(
            page_size=PAGE, max_batch_size=batch, max_length=lengths.total, prefix_reuse=False
        )
        engine = Engine(model.spec, new_runner(model, cache, settings, single), settings)
        for number, prompt in enumerate(prompts_of([lengths.prompt] * batch, TINY.vocabulary)):
            sampling = greedy(lengths.generated)
            engine.submit(Request(id=str(number), prompt=tuple(prompt), sampling=sampling))
        tokens, most = 0, 0
        while engine.has_work:
            tokens += sum(len(output.tokens) for output in engine.step())
            most = max(most, engine.stats().running)
        assert tokens == batch * lengths.generated
        # Where all end in the step that the last of them came in, nobody saw them together.
        return engine.stats().preempted == 0 and most == batch

    pages = batch_pages(layout, batch, lengths)
    assert all_at_once(pages)
    for number, group in enumerate(layout.groups):
        if group.window is None:
            fewer = tuple(count - (place == number) for place, count in enumerate(pages))
            assert not all_at_once(fewer)


def model_device(model):
    return next(model.parameters()).device


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 63, 64, 99, 100, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_search_finds_the_limit_in_few_tries(limit: int, share: float) -> None:
    tried = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    found = largest(fits, 100, share)
    wanted = min(limit, 100)
    assert found <= wanted <= found * (1 + share) + (1 if share else 0)
    assert len(tried) == len(set(tried)) <= 14 and (found == 0 or found in tried)
    if limit >= 100:
        assert tried == [100]
