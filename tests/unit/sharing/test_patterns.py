"""Named maps: the published examples, small numbers of KV layers, presets, and plain errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.errors import MapError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import (
    build_map,
    list_patterns,
    takes_kv_layers,
    warnings,
    window_faults,
)
from tests.unit.sharing.strategies import NINE

PARTITION_NAMES = tuple(name for name in list_patterns() if takes_kv_layers(name))


def own_except(num_layers: int, first: int, last: int, target: int) -> tuple[int, ...]:
    """Every layer owns its KV, but ``first..last`` read ``target``."""
    return tuple(target if first <= layer <= last else layer for layer in range(num_layers))


EXAMPLES = [
    (22, "pizza-bottom", 11, own_except(22, 10, 21, 10)),
    (22, "pizza-middle", 3, own_except(22, 2, 21, 11)),
    (22, "pizza-top", 11, own_except(22, 10, 21, 21)),
    (22, "sandwich-top", 11, own_except(22, 5, 16, 16)),
    (22, "sandwich-top", 3, own_except(22, 1, 20, 20)),
    (22, "sandwich-middle", 3, own_except(22, 1, 20, 10)),
    (22, "sandwich-bottom", 6, own_except(22, 3, 19, 3)),
    (12, "sandwich-top", 3, own_except(12, 1, 10, 10)),
    (22, "lasagna-bottom", 11, tuple(layer - layer % 2 for layer in range(22))),
    (22, "lasagna-top", 11, tuple(layer + 1 - layer % 2 for layer in range(22))),
    (12, "lasagna-middle", 3, (1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9)),
    (8, "lasagna-top", 3, (2, 2, 2, 5, 5, 5, 7, 7)),  # a remainder goes to the lowest groups
    (7, "lasagna-bottom", 4, (0, 0, 2, 2, 4, 4, 6)),
    (8, "lasagna0-top", 3, (0, 4, 4, 4, 4, 7, 7, 7)),
    (8, "lasagna0-middle", 3, (0, 2, 2, 2, 2, 6, 6, 6)),
    (22, "sandwich-middle-1/4", 3, own_except(22, 1, 20, 1 + 19 // 4)),
    (22, "pizza-middle-3/4", 3, own_except(22, 2, 21, 2 + 3 * 19 // 4)),
    (9, "lasagna-middle-1/4", 1, (2,) * 9),
    (9, "lasagna-middle-3/4", 1, (6,) * 9),
    (4, "sandwich-top", 1, (3, 3, 3, 3)),
    (4, "sandwich-top", 2, (0, 3, 3, 3)),
    (4, "sandwich-middle", 4, (0, 1, 2, 3)),
    (1, "sandwich-top", 1, (0,)),
    (1, "lasagna0-top", 1, (0,)),
]


@pytest.mark.parametrize(("num_layers", "pattern", "kv_layers", "sources"), EXAMPLES)
def test_examples(num_layers: int, pattern: str, kv_layers: int, sources: tuple[int, ...]) -> None:
    sharing = build_map(num_layers, pattern, kv_layers)
    assert sharing.sources == sources
    assert not any(sharing.windowed)


def test_the_nine_names_are_there() -> None:
    assert set(NINE) < set(list_patterns())


@given(st.data(), st.sampled_from(PARTITION_NAMES), st.integers(1, 40))
def test_partitions_have_the_kv_layers_asked_for(
    data: st.DataObject, pattern: str, num_layers: int
) -> None:
    least = min(2, num_layers) if pattern.startswith("lasagna0") else 1
    kv_layers = data.draw(st.integers(least, num_layers))
    sharing = build_map(num_layers, pattern, kv_layers)
    assert len(sharing.producers) == kv_layers
    assert sharing.num_layers == num_layers
    if pattern.endswith("bottom"):
        assert not sharing.is_cyclic
    if pattern.endswith("top"):
        assert all(source >= layer for layer, source in enumerate(sharing.sources))
    if pattern.startswith("lasagna0"):
        assert sharing.is_producer(0)


@pytest.mark.parametrize(
    ("num_layers", "pattern", "notation"),
    [
        (3, "standard", "0_1_2"),
        (4, "cla:2", "0_0_2_2"),
        (5, "cla:2", "0_0_2_2_4"),
        (7, "mlkv:3", "0_0_0_3_3_3_6"),
        (4, "cla:1", "0_1_2_3"),
        (12, "lckv:2", "0_10_10_10_10_10_10_10_10_10_10_11"),
        (4, "lckv:0", "3_3_3_3"),
        (6, "yoco", "0s_1s_2s_3_3_3"),
        (5, "yoco", "0s_1s_2_2_2"),
        (8, "gemma:2", "0s_1s_2s_3s_4_5s_5s_5s"),
        (10, "gemma:4", "0s_1s_2s_3s_4_5s_5s_5s_5s_4"),
        (6, "gemma:0", "0s_1s_2s_3s_4_5s"),
        (
            22,
            "mixattention",
            "0_1s_1s_3s_3s_3s_0_7s_7s_9s_9s_9s_12_13s_13s_15s_15s_15s_12_19s_19s_19s",
        ),
    ],
)
def test_presets(num_layers: int, pattern: str, notation: str) -> None:
    assert build_map(num_layers, pattern).notation == notation


def test_yoco_upper_half_reads_its_lowest_layer_with_full_attention() -> None:
    sharing = build_map(22, "yoco")
    assert sharing.sources[11:] == (11,) * 11
    assert sharing.windowed == (True,) * 11 + (False,) * 11


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0,), ["--num-layers", "at least one"]),
        ((8, "sandwhich-top", 3), ["--kv-pattern", "did you mean sandwich-top"]),
        ((8, "Yoco"), ["did you mean yoco"]),
        ((8, "zzz"), ["no pattern of this name", "cla:G"]),
        ((8, "sandwich-top"), ["--kv-layers", "is needed by sandwich-top", "1 to 8"]),
        ((8, "sandwich-top", 9), ["--kv-layers = 9", "1 to 8"]),
        ((8, "pizza-bottom", 0), ["--kv-layers = 0", "1 to 8"]),
        ((8, "lasagna0-top", 1), ["2 to 8"]),
        ((8, "sandwich-top:3"), ["no parameter", "--kv-layers 3"]),
        ((8, "yoco:3"), ["no parameter", "--kv-pattern yoco"]),
        ((8, "cla"), ["cla:2", "1 to 8"]),
        ((8, "cla:0"), ["1 to 8"]),
        ((8, "cla:x"), ["1 to 8"]),
        ((8, "lckv:8"), ["0 to 7"]),
        ((8, "gemma:8"), ["0 to 7"]),
        ((10, "gemma:7"), ["layer 4", "full-attention"]),
        ((12, "mixattention"), ["22 layers", "--kv-map"]),
        ((8, "standard", 4), ["standard has 8 KV layers", "sandwich-top"]),
        ((8, "cla:2", 5), ["cla:2 has 4 KV layers"]),
        ((4, "standard", None, "0_1_2"), ["3 entries", "--num-layers 3"]),
        ((3, "yoco", 2, "0_1_1_2"), ["layer 3", "exclude each other"]),
        ((3, "yoco", 1, "0_1_1"), ["2 faults", "exclude each other", "has 2 KV layers"]),
    ],
)
def test_errors_teach(arguments: tuple[object, ...], expected: list[str]) -> None:
    with pytest.raises(MapError) as caught:
        build_map(*arguments)  # type: ignore[arg-type]
    for text in [*expected, "Fix:"]:
        assert text in str(caught.value)


def test_a_consistent_number_of_kv_layers_is_accepted() -> None:
    assert build_map(8, "cla:2", 4) == build_map(8, "cla:2")
    assert build_map(8, "standard", 8) == build_map(8)
    assert build_map(3, kv_layers=2, kv_map="0_1_1").notation == "0_1_1"


def test_warnings() -> None:
    assert warnings(build_map(8, "sandwich-top", 4)) == []
    assert "layer 0" in warnings(build_map(8, "lasagna-top", 4))[0]
    assert warnings(build_map(8, "lasagna0-top", 4)) == []
    assert "no effect" in warnings(build_map(8), window_size=4)[0]
    assert warnings(build_map(8, "yoco"), window_size=4) == []
    assert "see no token" in warnings(SharingMap.parse("0_2s_2"), window_size=1)[0]


def test_window_faults() -> None:
    yoco = build_map(8, "yoco")
    assert window_faults(yoco, 128) == []
    assert window_faults(build_map(8), None) == []
    assert "--window-size" in str(window_faults(yoco, None)[0])
    assert "at least one token" in str(window_faults(yoco, 0)[0])
