"""Requests come and go; pages, ids and counts stay right."""

from __future__ import annotations

import random

import pytest

from megatron_kvshare.errors import ConfigError
from megatron_kvshare.serving.request import FinishReason, Request, Sampling
from megatron_kvshare.sharing.patterns import build_map
from tests.product import Tiny
from tests.serving import ask, drain, greedy, prompts_of, tiny_engine

TINY = Tiny()
MAPS = [build_map(4, "sandwich-top", 2), build_map(8, kv_map="0s_4_4s_4_4s_0s_7s_7")]


@pytest.mark.parametrize("sharing", MAPS, ids=str)
@pytest.mark.parametrize("mode", ["trained", "exact"])
def test_a_random_life_loses_nothing(sharing, mode: str, single) -> None:
    """Requests of random lengths, some cancelled at random, in a cache that holds two or three:
    each ends once, with as many tokens as it asked for, and every page comes back."""
    draw = random.Random(1)
    engine = tiny_engine(
        TINY,
        sharing,
        single,
        TINY.weights(sharing),
        kv_prefill=mode,
        cache_tokens=48,
        page_size=2,
        prefill_tokens=8,
        max_batch_size=5,
    )
    left = {str(number): draw.randint(0, 12) for number in range(24)}
    asked, cancelled, got, ended = dict(left), set(), {name: 0 for name in left}, {}
    waiting = list(left)
    while waiting or engine.has_work:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                name = waiting.pop()
                (prompt,) = prompts_of([draw.randint(1, 16)], TINY.vocabulary, seed=len(waiting))
                how = Sampling(max_tokens=asked[name], ignore_eos=True, seed=1)
                engine.submit(Request(id=name, prompt=tuple(prompt), sampling=how))
        if draw.random() < 0.1:
            name = draw.choice(list(left))
            engine.cancel(name)
            cancelled.add(name)
        for output in engine.step():
            assert output.id not in ended
            got[output.id] += len(output.tokens)
            if output.finished:
                ended[output.id] = output.finished
    assert set(ended) == set(left)
    for name, reason in ended.items():
        if reason is FinishReason.CANCELLED:
            assert name in cancelled and got[name] <= asked[name]
        else:
            assert (got[name], reason) == (asked[name], FinishReason.LENGTH)
    stats = engine.stats()
    assert stats.free_pages == stats.pages and stats.running == stats.waiting == 0
    assert stats.preempted > 0 and stats.generated_tokens == sum(got.values())
    assert not engine.runner.worker._aside


def test_the_longest_text_ends_at_the_limit(single) -> None:
    (sharing, *_) = MAPS
    engine = tiny_engine(TINY, sharing, single, TINY.weights(sharing), max_length=16)
    (tokens,) = ask(engine, prompts_of([10], TINY.vocabulary), Sampling(ignore_eos=True, seed=0))
    assert len(tokens) == 6
    with pytest.raises(ConfigError, match="at most 16 together"):
        engine.submit(Request(id="long", prompt=(1,) * 16))
    engine.submit(Request(id="scored", prompt=(1,) * 16, sampling=greedy(0)))
    assert [output.finished for output in drain(engine)] == ["length"]


def test_stop_tokens_end_a_text(single) -> None:
    (sharing, *_) = MAPS
    engine = tiny_engine(TINY, sharing, single, TINY.weights(sharing))
    prompts = prompts_of([5], TINY.vocabulary)
    (free,) = ask(engine, prompts, greedy(8))
    how = Sampling(temperature=0, max_tokens=8, stop_token_ids=(free[3],))
    engine.submit(Request(id="0", prompt=tuple(prompts[0]), sampling=how))
    outputs = drain(engine)
    assert [t for output in outputs for t in output.tokens] == free[: free.index(free[3]) + 1]
    assert outputs[-1].finished is FinishReason.STOP


def test_all_that_is_wrong_with_a_request_is_said(single) -> None:
    (sharing, *_) = MAPS
    engine = tiny_engine(TINY, sharing, single, TINY.weights(sharing))
    engine.submit(Request(id="a", prompt=(1,)))
    with pytest.raises(ConfigError) as caught:
        engine.submit(Request(id="a", prompt=(99,) * 70, sampling=Sampling(stop=("x",))))
    assert [fault.where for fault in caught.value.faults] == ["id", "prompt", "prompt", "stop"]
    assert engine.stats().waiting == 1


def test_the_first_to_come_is_always_served(single) -> None:
    """However many are set aside, the oldest goes on at every step."""
    (sharing, *_) = MAPS
    engine = tiny_engine(
        TINY, sharing, single, TINY.weights(sharing), cache_tokens=28, page_size=2, max_length=28
    )
    prompts = prompts_of([6] * 6, TINY.vocabulary)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(id=str(number), prompt=tuple(prompt), sampling=greedy(20)))
    for _ in range(20):
        assert "0" in {output.id for output in engine.step()}
    assert engine.stats().preempted > 0
    drain(engine)
