"""The map itself: notation, roles, cyclic groups, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.errors import ConfigError, MapError
from megatron_kvshare.sharing.map import SharingMap
from tests.unit.sharing.strategies import sharing_maps


def test_parse_reads_targets_and_windows() -> None:
    sharing = SharingMap.parse("0_1s_1s_3")
    assert sharing.sources == (0, 1, 1, 3)
    assert sharing.windowed == (False, True, True, False)
    assert sharing.producers == (0, 1, 3)
    assert sharing.consumers_of(1) == (2,)
    assert not sharing.is_cyclic


def test_roles_of_an_upward_map() -> None:
    sharing = SharingMap.parse("0_5_5_5_4_5_6_7")
    assert [sharing.is_upward(layer) for layer in range(8)] == [False, *[True] * 3, *[False] * 4]
    assert [sharing.is_producer(layer) for layer in (3, 4, 5)] == [False, True, True]
    assert sharing.consumers_of(5) == (1, 2, 3)
    assert sharing.cyclic_groups == ((1, 5),)


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("0_1_2", ()),
        ("0_0_0", ()),
        ("1_1", ((0, 1),)),
        ("1_1_3_3", ((0, 1), (2, 3))),  # small groups that touch stay apart
        ("2_3_2_3", ((0, 3),)),  # a layer inside raises the top
        ("2_4_2_5_4_5", ((0, 5),)),  # and does so repeatedly
        ("2_1_2_0", None),  # layer 0 is no producer
        ("2_1_2_1", ((0, 2),)),  # a reader above the group does not belong to it
        ("0_3_0_3_3", ((1, 3),)),  # a layer inside may read below the group
    ],
)
def test_cyclic_groups(notation: str, groups: tuple[tuple[int, int], ...] | None) -> None:
    if groups is None:
        with pytest.raises(MapError):
            SharingMap.parse(notation)
    else:
        assert SharingMap.parse(notation).cyclic_groups == groups


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("", ["layer 0"]),
        ("0_x", ["layer 1", "'x'"]),
        ("0_1w", ["layer 1", "'1w'"]),
        ("0__1", ["layer 1"]),
        ("0_-1", ["layer 1"]),
        ("0_1_7", ["layer 2", "0 to 2"]),
        ("1_2_2", ["layer 0", "layer 1 itself reads layer 2"]),
        ("x_9_0", ["2 faults", "layer 0", "layer 1"]),
    ],
)
def test_bad_notation_names_layer_and_fix(notation: str, expected: list[str]) -> None:
    with pytest.raises(MapError) as caught:
        SharingMap.parse(notation)
    for text in [*expected, "Fix:"]:
        assert text in str(caught.value)


def test_all_faults_of_a_map_come_together() -> None:
    with pytest.raises(MapError) as caught:
        SharingMap((1, 2, 2, 9, -1), (False,))
    assert len(caught.value.faults) == 4
    assert isinstance(caught.value, ConfigError)


def test_an_empty_map_is_refused() -> None:
    with pytest.raises(MapError, match="at least one layer"):
        SharingMap((), ())


@given(sharing_maps())
def test_parse_round_trip(sharing: SharingMap) -> None:
    assert SharingMap.parse(sharing.notation) == sharing
    assert str(sharing) == sharing.notation


@given(sharing_maps())
def test_every_layer_reads_a_producer(sharing: SharingMap) -> None:
    assert all(sharing.is_producer(source) for source in sharing.sources)
    readers = {reader for layer in sharing.producers for reader in sharing.consumers_of(layer)}
    assert readers == set(range(sharing.num_layers)) - set(sharing.producers)


@given(sharing_maps())
def test_groups_are_the_merged_upward_spans(sharing: SharingMap) -> None:
    """An independent definition: spans [reader, target] that overlap belong to one group."""
    merged: list[tuple[int, int]] = []
    for layer in filter(sharing.is_upward, range(sharing.num_layers)):
        target = sharing.sources[layer]
        if merged and layer <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], target))
        else:
            merged.append((layer, target))
    assert sharing.cyclic_groups == tuple(merged)
    assert sharing.is_cyclic == bool(merged)


@given(sharing_maps())
def test_groups_are_ordered_disjoint_and_closed(sharing: SharingMap) -> None:
    groups = sharing.cyclic_groups
    assert all(first < last for first, last in groups)
    assert all(low[1] < high[0] for low, high in itertools.pairwise(groups))
    for first, last in groups:
        assert sharing.is_upward(first)
        assert sharing.is_producer(last)
        assert max(sharing.sources[first : last + 1]) == last
    inside = {layer for first, last in groups for layer in range(first, last + 1)}
    assert set(filter(sharing.is_upward, range(sharing.num_layers))) <= inside


@given(st.lists(st.integers(-2, 8), min_size=1, max_size=7))
def test_any_list_is_a_valid_map_or_a_plain_error(sources: list[int]) -> None:
    valid = all(0 <= s < len(sources) and sources[s] == s for s in sources)
    if valid:
        assert SharingMap(tuple(sources), (False,) * len(sources)).num_layers == len(sources)
    else:
        with pytest.raises(MapError):
            SharingMap(tuple(sources), (False,) * len(sources))
