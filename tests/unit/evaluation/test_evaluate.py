"""``kvshare evaluate``: every token scored once, the gap and its KL, files, wrong calls."""

from __future__ import annotations

import csv
import json
import math

import numpy
import pytest
import torch

from megatron_kvshare import load_model
from megatron_kvshare.cli.main import main
from megatron_kvshare.evaluation.evaluate import score, windows
from megatron_kvshare.megatron_api.datasets import TokenFileWriter
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import write_folder

TOP = build_map(8, "sandwich-top", 3)
BOTTOM = build_map(8, "pizza-bottom", 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory, single):
    root = tmp_path_factory.mktemp("models")
    write_folder(root / "top", TOP, RECIPES["one-sweep"])
    write_folder(root / "bottom", BOTTOM)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "x"
    writer = TokenFileWriter(prefix.with_suffix(".bin"), 40)
    draw = numpy.random.default_rng(0)
    for length in (30, 41, 17, 25):
        writer.add_document(draw.integers(0, 40, length))
    writer.finalize(prefix.with_suffix(".idx"))
    return prefix


@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 17, 18, 40])
def test_windows_predict_every_token_once(count):
    ids = torch.arange(count)
    found = [window for batch in windows(ids, 8, 3) for window in batch]
    assert torch.cat([window[1:] for window in found]).tolist() == list(range(1, count))
    assert all(window[0] == window[1] - 1 for window in found)


def test_scores_are_means_over_tokens(models):
    model = load_model(models / "top")
    ids = torch.randint(40, (51,), generator=torch.Generator().manual_seed(1))
    scores = score(model, ids, 16, 2, gap_tokens=30)
    losses, exact, kl = [], [], []
    for number, window in enumerate([ids[i : i + 17] for i in (0, 16, 32)] + [ids[48:]]):
        inputs, labels = window[None, :-1], window[1:]
        passes = model.logits(inputs)[0].log_softmax(-1)
        losses += (-passes[range(len(labels)), labels]).tolist()
        if number < 2:
            wanted = model.logits(inputs, mode="exact")[0].log_softmax(-1)
            exact += (-wanted[range(len(labels)), labels]).tolist()
            kl += (wanted.exp() * (wanted - passes)).sum(-1).tolist()
    assert (scores.tokens, scores.gap_tokens) == (50, 32)
    assert scores.loss == pytest.approx(numpy.mean(losses), rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(numpy.mean(losses)), rel=1e-5)
    assert scores.exact_loss == pytest.approx(numpy.mean(exact), rel=1e-6)
    assert scores.gap == pytest.approx(numpy.mean(exact) - numpy.mean(losses[:32]), abs=1e-5)
    assert scores.kl == pytest.approx(numpy.mean(kl), rel=1e-4) and scores.kl > 0


def test_a_map_without_upward_layers_has_no_gap(models):
    scores = score(load_model(models / "bottom"), torch.arange(30), 8, 2, gap_tokens=100)
    assert scores.gap is None and scores.kl is None
    assert scores.rows().keys() == {"tokens", "loss", "perplexity"}


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_the_command_writes_its_table(models, files, tmp_path, capsys):
    out = tmp_path / "scores"
    where = ("--hf", models / "top", "--data-path", files, "--seq-length", 16)
    assert evaluate(*where, "--output", out) == 0
    assert "perplexity" in capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text())["results"]
    by_name = {row["metric"]: row["value"] for row in rows}
    assert by_name["tokens"] == 30 + 41 + 17 + 25 - 1
    with (out / "results.csv").open() as file:
        assert {row["metric"]: float(row["value"]) for row in csv.DictReader(file)} == by_name
    assert evaluate(*where, "--split", "50,50,0", "--output", out) == 0
    rows = json.loads((out / "results.json").read_text())["results"]
    assert rows[0]["value"] == 17 + 25 - 1, "the last two documents are for validation"


WRONG = {
    "no model": (("--data-path", "{files}"), "one model is evaluated"),
    "two models": (("--hf", "a", "--load", "b", "--data-path", "x"), "one model is evaluated"),
    "nothing to score": (("--hf", "{models}/top"), "one text to score, or tasks"),
    "two texts": (("--hf", "a", "--data-path", "x", "--text", "y"), "one text to score"),
    "no such data": (("--hf", "{models}/top", "--data-path", "missing"), "missing"),
    "no tokenizer": (("--hf", "{models}/top", "--text", "{files}.bin"), "tokenizer"),
    "nothing for validation": (
        ("--hf", "{models}/top", "--data-path", "{files}", "--split", "1,0,0"),
        "is for validation",
    ),
    "crooked split": (
        ("--hf", "{models}/top", "--data-path", "{files}", "--split", "a,b"),
        "it must be one to three numbers",
    ),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG.keys())
def test_wrong_calls(arguments, says, models, files, capsys):
    given = [argument.format(models=models, files=files) for argument in arguments]
    assert evaluate(*given) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
