"""What the stop-watch runs: the batch, places and bytes that it says."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.bench.capacity import Lengths
from megatron_kvshare.bench.random_weights import RandomWeights
from megatron_kvshare.bench.timing import Bed, begin, move_on, places, step_times, time_batch
from megatron_kvshare.costs.cost import kv_bytes_per_token
from megatron_kvshare.model.parameters import gather_by_name, initialize
from megatron_kvshare.serving.load import serving_model
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.sharing.patterns import build_map
from tests.product import Tiny
from tests.serving import Recorder

TINY = Tiny()
SETTINGS = EngineSettings(page_size=4, prefill_tokens=20)
LENGTHS = Lengths(8, 24)


def never() -> bool:
    return False


def bed_of(sharing, single, steps: int = 8) -> Bed:
    weights = RandomWeights(TINY.spec(sharing), torch.device("cpu"), torch.float32)
    return Bed(serving_model(TINY.spec(sharing), weights, False, single), single, SETTINGS, steps)


@pytest.mark.parametrize("name", ["standard", "sandwich-top"])
def test_bytes_are_those_of_the_tensors_and_of_the_plan(name: str, single) -> None:
    sharing = build_map(4, name, None if name == "standard" else 2)
    bed = bed_of(sharing, single)
    timing = time_batch(bed, 3, LENGTHS, never)
    engine = bed.engine(3, LENGTHS)
    pools = [pool for kv in engine.runner.worker.cache.pools.values() for pool in kv]
    allocated = sum(pool.numel() * pool.element_size() for pool in pools)
    assert timing.cache_bytes == allocated
    assert timing.cache_tokens == 3 * LENGTHS.total
    planned = kv_bytes_per_token(TINY.spec(sharing).shape, sharing, bytes_per_element=4)
    assert allocated == 3 * LENGTHS.total * planned
    assert timing.steps == 8 and timing.batch == 3
    whole = timing.prefill_seconds + 23 * timing.step_seconds
    assert timing.seconds(LENGTHS) == pytest.approx(whole)
    assert timing.tokens_per_second(LENGTHS) == pytest.approx(3 * 24 / whole)
    assert timing.ttft_seconds > 0 and timing.prefill_seconds > 0


@pytest.mark.parametrize("steps", [8, 100])
@pytest.mark.parametrize("kv_map", ["0_1_1_3", "0s_3s_2_3"])
def test_steps_are_timed_where_the_generation_is(kv_map: str, steps: int, single) -> None:
    """In full, or at places spread evenly; every step has the whole batch, each sequence as long as
    the place says, in pages that come back at the end."""
    bed = bed_of(build_map(4, kv_map=kv_map), single, steps)
    engine = bed.engine(3, LENGTHS)
    engine.runner = Recorder(engine.runner.worker, single)
    times = step_times(engine, 3, LENGTHS, steps, never)
    fed_back = [[token.position for token in step.tokens] for step in engine.runner.steps]
    fed_back = [positions for positions in fed_back if positions]
    wanted = places(LENGTHS, steps)
    assert [len(each) for each in times] == [len(place) for place in wanted]
    warmed = [position for place in wanted for position in (place.start - 1, *place)]
    assert fed_back == [[position] * 3 for position in warmed]
    assert engine.stats().free_pages == engine.stats().pages
    assert engine.stats().preempted == 0


def test_places() -> None:
    assert places(Lengths(8, 24), 22) == [range(9, 31)]
    assert places(Lengths(1, 4), 32) == [range(2, 4)]
    spread = places(Lengths(5, 2043), 32)
    assert [len(each) for each in spread] == [8] * 4
    middles = [(each.start + each.stop) / 2 for each in spread]
    assert middles == pytest.approx(
        [5 + 2043 * part for part in (1 / 8, 3 / 8, 5 / 8, 7 / 8)], abs=3
    )


def test_moved_on_to_the_last_token(single) -> None:
    """As far as the cache goes, and not back."""
    bed = bed_of(build_map(4), single)
    engine = bed.engine(2, LENGTHS)
    begin(engine, 2, LENGTHS)
    move_on(engine, LENGTHS.total - 2)
    move_on(engine, 3)
    outputs = engine.step()
    assert all(output.finished for output in outputs) and len(outputs) == 2
    assert engine.stats().preempted == 0


def test_without_time_each_place_has_one_step(single) -> None:
    bed = bed_of(build_map(4), single)
    times = step_times(bed.engine(2, LENGTHS), 2, LENGTHS, 8, lambda: True)
    assert [len(each) for each in times] == [1] * 4


def test_random_weights_are_as_initialised(single) -> None:
    tiny = TINY.but(hidden=128, ffn=256, vocabulary=512)
    spec = tiny.spec(build_map(4))
    weights = RandomWeights(spec, torch.device("cpu"), torch.float32)
    model = tiny.model(build_map(4), single)
    initialize(model, seed=0)
    for name, wanted in gather_by_name([model], single).items():
        drawn = weights.read(name)
        assert drawn.shape == wanted.shape
        assert drawn.mean() == pytest.approx(wanted.mean().item(), abs=2e-3)
        assert drawn.std() == pytest.approx(wanted.std().item(), rel=0.1)
