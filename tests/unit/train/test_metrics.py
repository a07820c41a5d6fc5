"""Records, their arithmetic and where they go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint.manifest import Progress
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.train.console import Console
from megatron_kvshare.train.metrics import Metrics, Stopwatch, perplexity, residual_fields
from megatron_kvshare.train.sinks import JsonLines


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_stopwatch_leaves_pauses_out() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 2
    watch.add_step(100)
    with watch.paused():
        clock.now += 50
    clock.now += 2
    watch.add_step(100)
    assert watch.lap() == 50
    assert watch.seconds_per_step() == 2
    clock.now += 1
    watch.add_step(100)
    assert watch.lap() == 100
    assert watch.seconds_per_step() == pytest.approx(5 / 3)


def test_records_have_the_promised_fields(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    for step in (0, 3):  # the second run goes on after step 3
        metrics = Metrics([JsonLines(path, step)], 10, flops_per_token=2e9, peak_tflops=4.0)
        metrics.watch.add_step(64)
        progress = Progress(step=3, samples=6, tokens=192)
        metrics.train(progress, 1 / 3, 0.1, 2.0, kv_residual=None, skipped=None)
        metrics.valid(3, math.log(7))
        metrics.close()
    train, valid, *rest = map(json.loads, path.read_text().splitlines())
    assert len(rest) == 2
    assert (train["step"], train["loss"], train["lr"], train["grad_norm"]) == (3, 1 / 3, 0.1, 2.0)
    assert train["tokens"] == 192
    assert train["tflops"] == pytest.approx(train["tokens_per_second"] * 2e9 / 1e12)
    assert train["mfu"] == pytest.approx(train["tflops"] / 4)
    assert "kv_residual" not in train and "skipped" not in train
    assert valid == {
        "step": 3,
        "valid_loss": math.log(7),
        "valid_perplexity": perplexity(math.log(7)),
    }


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    sink.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None}


def test_metrics_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--metrics-file"):
        JsonLines(tmp_path / "file" / "metrics.jsonl", 0)


def test_residuals_of_all_passes_are_fields() -> None:
    assert residual_fields(()) == {}
    assert residual_fields((1.0, 0.5, 0.25)) == {
        "kv_residual": 0.25,
        "kv_residual_1": 1.0,
        "kv_residual_2": 0.5,
        "kv_residual_3": 0.25,
    }


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf


def test_console_lines(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics([Console(train_iters=200)], 200, flops_per_token=1e9, peak_tflops=1.0)
    metrics.watch.add_step(64)
    progress = Progress(step=50, tokens=3200, skipped_steps=1)
    metrics.train(progress, 2.5, 3e-4, 1.25, kv_residual=0.001)
    metrics.valid(50, 1.0)
    train, valid = capsys.readouterr().out.splitlines()
    for part in ("step  50/200 (25%)", "ETA ", "loss 2.5000", "lr 0.0003", "grad norm 1.250"):
        assert part in train
    for part in ("tokens/s", "TFLOP/s", "MFU", "KV residual 0.001", "1 steps skipped"):
        assert part in train
    assert valid == "step  50/200 | validation loss 1.0000 | perplexity 2.72"
