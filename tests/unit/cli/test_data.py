"""``kvshare data``: what its commands print, and that their faults are the user's."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy
import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.config import DataConfig
from megatron_kvshare.data import train_data
from megatron_kvshare.data.data_plan import DataRequest
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.megatron_api.datasets import TokenFileWriter


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    writer = TokenFileWriter(tmp_path / "web.bin", 100)
    for number in range(40):
        writer.add_document(numpy.arange(5 + number % 20))
    writer.finalize(tmp_path / "web.idx")
    return str(tmp_path / "web")


def test_merge_split_and_shuffle(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    to = ["--input", prefix, "--output-prefix", out]
    assert main(["data", "merge", *to, "--dedup", "exact"]) == 0
    printed = capsys.readouterr().out
    assert "left out 20 documents" in printed and f"wrote {out}.bin and .idx: 20" in printed
    assert main(["data", "split", *to, "--split", "75,25"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}_train.bin and .idx: 30 documents" in printed and f"{out}_valid.bin" in printed
    assert not Path(f"{out}_test.bin").exists()
    assert main(["data", "shuffle", *to, "--seed", "3", "--max-memory-mb", "1"]) == 0
    assert "40 documents" in capsys.readouterr().out


def test_inspect(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "lengths.png"
    flags = ["--seq-length", "16", "--png", str(png)]
    assert main(["data", "inspect", "--input", prefix, *flags]) == 0
    printed = capsys.readouterr().out
    for text in ("40 documents, 580 tokens", "exact duplicates: 20 (50.0%)", "document ", "16-31"):
        assert text in printed
    assert "longer than a sequence of 16 tokens: 16 (40.0%)" in printed
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_the_png_needs_matplotlib(
    prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["data", "inspect", "--input", prefix, "--png", "x.png"]) == 2
    assert "megatron-kvshare[plot]" in capsys.readouterr().err


def test_an_index_is_made_ahead_of_time(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run finds all it needs, and writes nothing."""
    cache = tmp_path / "cache"
    flags = f"--data-path {prefix} --split 80,20,0 --data-cache-path {cache} --vocab-size 100"
    flags += " --seq-length 32 --num-layers 2 --kv-layers 2 --tensor-model-parallel-size 2"
    flags += " --global-batch-size 8 --eval-iters 2 --seed 5"
    assert main(["data", "index", *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert str(cache) in printed and "epochs" in printed
    before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(before) == 10
    request = DataRequest(
        seq_length=32,
        global_batch_size=64,
        train_iters=9,
        eval_iters=1,
        seed=5,
        vocabulary=Vocabulary(100),
    )
    paths = DataConfig(data_path=(prefix,), split="80,20,0", data_cache_path=str(cache))
    train_data.build(paths, request)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("data", "the commands are merge, split, shuffle, inspect, index"),
        ("data mix", "the commands are"),
        ("data merge", "--input"),
        ("data merge --input {prefix} --output-prefix {prefix}", "what it is made of"),
        ("data merge --input {prefix}x --output-prefix o", "there is no file"),
        ("data merge --input {prefix} --output-prefix o --dedup fuzzy", "none, exact"),
        ("data split --input {prefix} --output-prefix o --split 0,1", "--split"),
        ("data shuffle --input {prefix} --output-prefix o --max-memory-mb 0", "--max-memory-mb"),
        ("data inspect --input {prefix} --tokenizer-model none.model", "no such file"),
        ("data index --data-path {prefix}x --vocab-size 9", "there is no file"),
    ],
)
def test_faults(prefix: str, words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format(prefix=prefix).split()) == 2
    assert told in capsys.readouterr().err
