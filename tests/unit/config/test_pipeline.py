"""Pipeline settings: layouts that come out, and impossible ones refused with the remedy."""

from __future__ import annotations

import pytest

from megatron_kvshare.config.derive import placement, sharing_map
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import ConfigError

BASE = "--mock-data --vocab-size 100 --num-layers 8 --global-batch-size 8"


def parse(flags: str, processes: int):
    return parse_pretrain(f"{BASE} {flags}".split(), {"WORLD_SIZE": str(processes)})


@pytest.mark.parametrize(
    ("flags", "layout", "chunks"),
    [
        ("", (4, 4), 1),
        ("--num-layers-per-virtual-pipeline-stage 2", (2, 2, 2, 2), 2),
        ("--pipeline-model-parallel-layout 3,5", (3, 5), 1),
        ("--pipeline-model-parallel-layout Et|tt|tttt|tL", (1, 2, 4, 1), 2),
        (
            "--num-layers 6 --account-for-embedding-in-pipeline-split"
            " --account-for-loss-in-pipeline-split",
            (3, 3),
            1,
        ),
        (
            "--num-layers 6 --account-for-embedding-in-pipeline-split"
            " --account-for-loss-in-pipeline-split --num-layers-per-virtual-pipeline-stage 2",
            (1, 2, 2, 1),
            2,
        ),
    ],
)
def test_layouts(flags: str, layout: tuple[int, ...], chunks: int) -> None:
    config = parse(f"{flags} --pipeline-model-parallel-size 2", 2)
    placed = placement(sharing_map(config.model, config.sharing), config.parallel)
    assert (placed.layout, placed.chunks) == (layout, chunks)


SPANNING = "--pipeline-model-parallel-size 2 --kv-pattern sandwich-top --kv-layers 3"
TWO = "--pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    ("flags", "where", "rule", "fix"),
    [
        ("--pipeline-model-parallel-size 3", "--num-layers", "do not divide", "layout 3,3,2"),
        (f"{TWO} --pipeline-model-parallel-layout 4,3", "layout", "hold 7 layers", "layout 4,4"),
        (
            f"{TWO} --pipeline-model-parallel-layout 4,4 --num-layers-per-virtual-pipeline-stage 2",
            *("--num-layers-per-virtual", "says how many", "drop"),
        ),
        (
            f"{TWO} --num-layers-per-virtual-pipeline-stage 3",
            "--num-layers-per-virtual",
            *("divide the 4 layers", "use 2"),
        ),
        (
            "--num-layers-per-virtual-pipeline-stage 4",
            "--num-layers-per-virtual",
            *("several pipeline processes", "--pipeline-model-parallel-size 2"),
        ),
        (
            f"{TWO} --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 1",
            *("--global-batch-size", "at least --pipeline-model-parallel-size 2", "size 2 or more"),
        ),
        (
            f"{SPANNING} --kv-start self",
            "--kv-start",
            *("layer 1 on stage 0 reads keys and values that layer 6 makes on stage 1", "zero"),
        ),
        (
            f"{SPANNING} --kv-tolerance 0.01",
            "--kv-tolerance",
            "known before",
            "--kv-forward-sweeps",
        ),
        (f"{SPANNING} --overlap-grad-reduce", "--overlap-grad-reduce", "several times", "drop it"),
        (
            f"{TWO} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            *("--overlap-param-gather", "not supported", "drop it"),
        ),
    ],
)
def test_impossible_combinations(flags: str, where: str, rule: str, fix: str) -> None:
    processes = 6 if "size 3" in flags else 2
    with pytest.raises(ConfigError) as caught:
        parse(flags, processes)
    found = [fault for fault in caught.value.faults if where in fault.where]
    assert len(found) == 1, caught.value
    assert rule in found[0].rule and fix in found[0].fix


def test_spanning_groups_take_any_number_of_microbatches() -> None:
    flags = f"{SPANNING} --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 1"
    assert parse(flags, 2).train.global_batch_size == 1
