"""Layouts: notations, evenness, the proposed cut against all cuts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.errors import ConfigError
from megatron_kvshare.stages.layout import (
    even_ish,
    even_layout,
    layout_text,
    parse_layout,
    proposed_layout,
    slowest_stage,
)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("8,8,7,7", (8, 8, 7, 7)),
        (" 1, 29 ", (1, 29)),
        ("Et*8|t*8|t*7|t*7L", (8, 8, 7, 7)),
        ("Ettt|(tt|)*2tttL", (3, 2, 2, 3)),
        ("E,t,|,t,L", (1, 1)),
    ],
)
def test_notations(text: str, layout: tuple[int, ...]) -> None:
    assert parse_layout(text, sum(layout), 2) == layout
    assert parse_layout(layout_text(layout), sum(layout), 2) == layout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8,8,7", "hold 23 layers, the model has 30"),
        ("10,10,10", "multiple of the 2 pipeline ranks"),
        ("30,0", "stage 1 has no layer"),
        ("15,x", "list of layers"),
        ("t*15|t*15L", "E (embedding)"),
        ("Et*15|m*15L", "E (embedding)"),
    ],
)
def test_impossible_layouts(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layout(text, 30, 2)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "stages", "ends", "layout"),
    [
        (8, 4, (False, False), (2, 2, 2, 2)),
        (6, 4, (True, True), (1, 2, 2, 1)),
        (7, 4, (True, False), (1, 2, 2, 2)),
    ],
)
def test_even_layouts(layers, stages, ends, layout) -> None:
    assert even_layout(layers, stages, *ends) == layout


@pytest.mark.parametrize(("layers", "stages"), [(30, 4), (3, 4), (22, 8)])
def test_what_does_not_divide_is_an_error_with_a_layout_to_copy(layers: int, stages: int) -> None:
    with pytest.raises(ConfigError) as caught:
        even_layout(layers, stages)
    if layers >= stages:
        copied = str(caught.value).split("--pipeline-model-parallel-layout ")[1].rstrip(".")
        assert parse_layout(copied, layers, stages) == even_ish(layers, stages)


@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=8),
    st.integers(2, 4),
    st.lists(st.floats(0, 5), min_size=8, max_size=8),
)
def test_proposed_layout_is_the_fastest_of_all(work, stages, transport) -> None:
    stages = min(stages, len(work))
    transport = transport[: len(work)]

    layout = proposed_layout(work, stages, transport)
    assert sum(layout) == len(work) and len(layout) == stages
    cuts = itertools.combinations(range(1, len(work)), stages - 1)
    edges = ((0, *each, len(work)) for each in cuts)
    every = (tuple(b - a for a, b in itertools.pairwise(each)) for each in edges)
    best = min(slowest_stage(each, work, transport) for each in every)
    assert slowest_stage(layout, work, transport) == pytest.approx(best)


def test_slowest_stage_pays_for_both_of_its_cuts() -> None:
    assert slowest_stage((1, 2, 1), [1, 1, 1, 9], [0, 100, 7, 5]) == max(1 + 100, 2 + 105, 9 + 5)
