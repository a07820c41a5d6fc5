"""What a token and a prompt cost at least, counted again the slow way."""

from __future__ import annotations

import pytest

from megatron_kvshare.bench.bound import Rates, Work, decode_work, prefill_work
from megatron_kvshare.bench.capacity import Lengths
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from tests.product import Tiny

TINY = Tiny(vocabulary=48, untied=True)  # a multiple of 16: nothing is padded
LENGTHS = Lengths(5, 9)
WIDTH = 16
"""Of keys: 2 heads of 8."""
MAPS = {
    "standard": build_map(4),
    "cla:2": build_map(4, "cla:2"),
    "upward": build_map(4, "sandwich-top", 2),
    "windows": SharingMap.parse("0s_3s_2_3"),
}


def seen(sharing: SharingMap, layer: int, position: int) -> int:
    """Keys that a query sees, position by position."""
    upward = sharing.sources[layer] > layer
    last = position - 1 if upward else position
    first = position - TINY.window + 1 if sharing.windowed[layer] else 0
    return sum(first <= key <= last for key in range(position + 1))


@pytest.mark.parametrize("name", MAPS)
def test_every_reader_reads_the_cache(name: str) -> None:
    sharing, batch = MAPS[name], 3
    work = decode_work(TINY.spec(sharing), LENGTHS, batch, element_bytes=4)
    fed_back = range(5, 13)  # of 9 new tokens the last is not
    keys = sum(seen(sharing, layer, p) for layer in range(4) for p in fed_back) / 8
    assert work.kv_bytes == pytest.approx(batch * keys * 2 * WIDTH * 4)
    assert work.attention_flops == pytest.approx(batch * keys * 2 * 2 * TINY.hidden)


def test_sharing_saves_memory_but_no_reading() -> None:
    standard, shared = (
        decode_work(TINY.spec(MAPS[n]), LENGTHS, 3, 4) for n in ("standard", "cla:2")
    )
    assert standard.kv_bytes == shared.kv_bytes > 0
    projections = 2 * 2 * TINY.hidden * WIDTH  # of two layers that make no keys and values
    assert standard.weight_bytes - shared.weight_bytes == 4 * projections


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("name", ["standard", "upward"])
def test_weights_are_read_once(name: str, untied: bool, single) -> None:
    """All that the module has; of an embedding apart from the head, the rows of the tokens."""
    tiny, batch = TINY.but(untied=untied), 3
    model = tiny.model(MAPS[name], single)
    elements = sum(each.numel() for each in model.parameters())
    matrices = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    table = model.embedding.weight.numel()
    if untied:
        elements, matrices = elements - table + batch * tiny.hidden, matrices - table
    work = decode_work(tiny.spec(MAPS[name]), LENGTHS, batch, element_bytes=2)
    assert work.weight_bytes == 2 * elements
    assert work.linear_flops == batch * 2 * matrices


def layer_flops(tokens: int, attended: int, kv: bool = True) -> int:
    """Projections, MLP and attention of a layer, in which the queries see ``attended`` keys."""
    hidden, ffn = TINY.hidden, TINY.ffn
    linear = 2 * hidden * hidden + 3 * hidden * ffn + (2 * hidden * WIDTH if kv else 0)
    return 2 * tokens * linear + 2 * 2 * hidden * attended


def test_a_prompt_runs_trailing_layers_for_its_last_token() -> None:
    """Of the standard map all but the top one are whole; of a bottom map only those below its
    last KV layer; the KV of the top producer itself is made for every token."""
    tokens = 5
    whole = layer_flops(tokens, 15)
    keys_and_values = 2 * tokens * 2 * TINY.hidden * WIDTH
    last = layer_flops(1, tokens, kv=False)
    head = 2 * TINY.hidden * TINY.vocabulary
    wanted = {
        "standard": 3 * whole + keys_and_values + last + head,
        "pizza-bottom": whole + keys_and_values + 3 * last + head,
    }
    for name, flops in wanted.items():
        sharing = build_map(4, name, None if name == "standard" else 2)
        work = prefill_work(TINY.spec(sharing), "trained", LENGTHS, 3, 4)
        assert work.linear_flops == 3 * flops


def test_an_exact_prompt_of_a_cyclic_map_has_no_known_bound() -> None:
    spec = TINY.spec(MAPS["upward"])
    assert prefill_work(spec, "exact", LENGTHS, 1, 4) is None
    assert prefill_work(TINY.spec(MAPS["cla:2"]), "exact", LENGTHS, 1, 4) is not None
    converged = prefill_work(spec, "converged", Lengths(64, 4), 1, 4)
    standard = prefill_work(TINY.spec(MAPS["standard"]), "converged", Lengths(64, 4), 1, 4)
    assert standard.linear_flops < converged.linear_flops < 3 * standard.linear_flops


def test_the_slower_of_bytes_and_flops_decides() -> None:
    rates = Rates(bytes_per_second=10, flops_per_second=100)
    assert Work(20, 100, 30, 100).seconds(rates) == 2 + 3
    assert Work(20, 500, 30, 900).seconds(rates) == 5 + 9
