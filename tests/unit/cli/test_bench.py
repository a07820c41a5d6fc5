"""``kvshare bench``: one object of JSON, a table, figures, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_kvshare.bench.shapes import SHAPES
from megatron_kvshare.cli.bench_flags import BenchConfig, maps
from megatron_kvshare.cli.main import main
from megatron_kvshare.errors import EXIT_USER_ERROR
from tests.integration.conftest import ROOT

Capture = pytest.CaptureFixture[str]
SIZES = {
    "num-layers": 4,
    "hidden-size": 32,
    "ffn-hidden-size": 48,
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "vocab-size": 64,
}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
SHORT = ["--page-size", "4", "--cache-gb", "0.0001", "--decode-steps", "4"]
ROW = {
    "kv_map": list,
    "kv_layers": int,
    "num_layers": int,
    "batch": int,
    "cache_bytes": int,
    "tokens_per_second": float,
    "prefill_seconds": float,
    "decode_seconds_per_token": float,
}


def bench(*flags: str) -> int:
    return main(["bench", *TINY, *SHORT, *flags])


def refusal(capsys: Capture, *flags: str) -> str:
    assert main(["bench", *flags]) == EXIT_USER_ERROR
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


def test_json_and_figures(capsys: Capture, tmp_path: Path, single) -> None:
    """The standard map comes first; rows keep their names; bytes are those of the plan."""
    folder = tmp_path / "out"
    flags = ["--json", "--lengths", "4+8", "5+7", "--output", str(folder)]
    assert bench(*flags, "--kv-pattern", "sandwich-top", "cla:2", "--kv-layers", "2") == 0
    found = json.loads(capsys.readouterr().out)
    rows: list[dict[str, Any]] = found["rows"]
    assert found["left_out"] == []
    assert [row["map"] for row in rows[::2]] == ["standard", "sandwich-top 2", "cla:2"]
    assert [row["kv_map"] for row in rows[::2]] == [[0, 1, 2, 3], [0, 3, 3, 3], [0, 0, 2, 2]]
    assert [row["kv_layers"] for row in rows] == [4, 4, 2, 2, 2, 2]
    for row in rows:
        assert all(isinstance(row[name], kind) for name, kind in ROW.items())
        seconds = row["prefill_seconds"] + (row["generated"] - 1) * row["decode_seconds_per_token"]
        speed = row["batch"] * row["generated"] / seconds
        assert row["tokens_per_second"] == pytest.approx(speed)
        assert row["cache_bytes"] == row["cache_tokens"] * row["kv_bytes_per_token"] <= 100_000
        assert row["kv_bytes_per_token"] == 2 * planned_bytes(capsys, row)  # fp32; the plan: 16 bit
        assert row["batch"] <= row["max_batch"] and row["same_batch"] == rows[0]["max_batch"]
    standard, shared, _ = rows[::2]
    assert (standard["max_batch"], shared["max_batch"]) == (16, 32)
    assert json.loads((folder / "bench.json").read_text())["rows"] == rows
    for name in ("throughput.png", "prefill_latency.png"):
        assert (folder / name).stat().st_size > 10_000


def planned_bytes(capsys: Capture, row: dict[str, Any]) -> int:
    notation = "_".join(map(str, row["kv_map"]))
    assert main(["plan", "--json", *TINY, "--kv-map", notation]) == 0
    return json.loads(capsys.readouterr().out)["kv_bytes_per_token"]


def test_the_table_names_what_there_was_no_time_for(capsys: Capture, single) -> None:
    flags = ["--lengths", "4+8", "--kv-map", "0_1_1_3", "--budget", "0.001"]
    assert bench(*flags) == 0
    said = capsys.readouterr()
    assert "standard" in said.out and "0_1_1_3" not in said.out
    assert "left out for want of time (--budget 0.001): 0_1_1_3 4+8" in said.err
    assert max(map(len, said.out.splitlines())) <= 80
    assert "GB/s read" in said.out


def test_faults_come_together(capsys: Capture) -> None:
    flags = [
        "--lengths",
        "5x9",
        "5+1",
        "--kv-pattern",
        "cla:2",
        "sandwhich-top",
        "--kv-layers",
        "0",
    ]
    said = refusal(capsys, *flags)
    for part in ("5x9", "5+4", "--kv-layers"):
        assert part in said
    said = refusal(capsys, "--kv-pattern", "cla:2", "sandwhich-top")
    assert "did you mean" in said or "sandwich-top" in said
    said = refusal(capsys, "--kv-pattern", "cla:2", "--kv-layers", "3")
    assert "none of the maps takes a number of KV layers" in said
    said = refusal(capsys, "--load", "x", "--hf", "y", "--hidden-size", "64", "--shape", "1b")
    assert "--hidden-size" in said and "--shape" in said


def test_a_cache_that_holds_nothing(capsys: Capture, single) -> None:
    assert bench("--lengths", "4+8", "4096+4096", "--kv-map", "0_1_1_3") == EXIT_USER_ERROR
    said = capsys.readouterr()
    assert "one sequence of 4096+4096 of standard takes 0.00419 GB" in said.err and not said.out


def test_usual_maps_and_given_ones() -> None:
    usual = [each.name for each in maps(BenchConfig(), 12)]
    assert usual == ["pizza-bottom 6", "pizza-bottom 3", "sandwich-top 6", "sandwich-top 3"]
    config = BenchConfig(kv_pattern=("standard", "cla:2", "pizza-top"), kv_layers=(2,))
    assert [each.name for each in maps(config, 4)] == ["cla:2", "pizza-top 2"]
    (explicit,) = maps(BenchConfig(kv_map=("0_1_1_3",)), 4)
    assert explicit.map.notation == explicit.family == "0_1_1_3"


@pytest.mark.parametrize("name", ["110m", "1b"])
def test_shapes_are_those_of_the_examples(name: str) -> None:
    file = yaml.safe_load((ROOT / f"examples/configs/{name}.yaml").read_text())
    sizes = {key.replace("_", "-"): value for key, value in SHAPES[name].items()}
    assert sizes.pop("vocab-size") == 32000
    assert sizes == {key: file[key] for key in sizes}
    assert file.get("untie-embeddings-and-output-weights", False) == sizes.get(
        "untie-embeddings-and-output-weights", False
    )
