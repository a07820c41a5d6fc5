"""Early training at 1.1B by each recipe: exact validation loss against steps and against seconds.

    python benchmarks/recipes_1b.py --json recipes_1b.json

Two seeds x {standard, one-sweep, two-sweep} x {sandwich-top with 3 KV layers, sandwich-middle with
11}, 100 steps of 8,192 tokens of the embedded corpus each; needs a GPU of 80 GiB. What is in the
JSON file already is not run again. A dry run on any machine:

    python benchmarks/recipes_1b.py --config examples/configs/small.yaml --steps 5 --seeds 1 \\
        --batches 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results
import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("one-sweep", "two-sweep")


def trials(num_layers: int) -> dict[str, list[str]]:
    """Flags by name."""
    half = num_layers // 2
    maps = {"sandwich-top": 3, "sandwich-middle": half}
    return {
        "standard": ["--kv-pattern", "standard"],
        **{
            f"{name} {kept} {recipe}": [
                *("--kv-pattern", name, "--kv-layers", str(kept), "--kv-recipe", recipe)
            ]
            for name, kept in maps.items()
            for recipe in RECIPES
        },
    }


EVALUATIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "examples" / "configs" / "1b.yaml"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=4, help="of 4 sequences, per evaluation")
    parser.add_argument("--json", type=Path, default=Path("recipes_1b.json"))
    arguments = parser.parse_args()
    num_layers = yaml.safe_load(Path(arguments.config).read_text())["num-layers"]
    for seed in arguments.seeds:
        for name, flags in trials(num_layers).items():
            key = f"{name}, seed {seed}"
            if key not in results.read(arguments.json):
                print(f"{key} ...", flush=True)
                words = [*flags, "--config", arguments.config, "--seed", str(seed)]
                measured = train(words, arguments.steps, arguments.batches)
                results.keep(arguments.json, key, measured)
    print(table(results.read(arguments.json)))


def train(flags: list[str], steps: int, batches: int) -> dict[str, Any]:
    """Exact validation loss after every fifth of the steps, and the seconds of training until
    then; evaluation does not count."""
    tokens = corpus()
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        every = max(1, steps // EVALUATIONS)
        words = [
            *(sys.executable, "-m", "megatron_kvshare", "pretrain", *flags),
            *("--data-path", str(tokens / "corpus_text_document"), "--split", "90,10,0"),
            *("--tokenizer-model", str(tokens / "tokenizer.model")),
            *("--micro-batch-size", "4", "--global-batch-size", "4", "--train-iters", str(steps)),
            *("--lr", "4e-4", "--min-lr", "4e-5", "--lr-warmup-fraction", "0.2"),
            *("--eval-interval", str(every), "--eval-iters", str(batches)),
            *("--kv-gap-iters", str(batches), "--log-interval", "1"),
            *("--metrics-file", str(metrics)),
        ]
        subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return curve([json.loads(line) for line in metrics.read_text().splitlines()])


def curve(records: list[dict[str, Any]]) -> dict[str, Any]:
    """From the lines of a metrics file."""
    found: dict[str, Any] = {"step": [], "seconds": [], "exact_loss": []}
    seconds, tokens = 0.0, 0
    for record in records:
        if "loss" in record:
            seconds += (record["tokens"] - tokens) / record["tokens_per_second"]
            tokens = record["tokens"]
        else:
            found["step"].append(record["step"])
            found["seconds"].append(round(seconds, 2))
            found["exact_loss"].append(record["valid_loss"] + record.get("valid_kv_gap", 0.0))
    norms = [record["grad_norm"] for record in records if "loss" in record]
    return {**found, "largest_grad_norm": max(norms), "last_grad_norm": norms[-1]}


def corpus() -> Path:
    """The embedded corpus, tokenised."""
    script = ROOT / "examples" / "prepare_corpus.sh"
    made = subprocess.run(["bash", script], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return ROOT / made.stdout.split()[-1]


def table(everything: dict[str, Any]) -> str:
    """Rows for docs/solvers.md."""
    rows = ["| run | exact loss (seconds of training) after each step | last gradient norm |"]
    rows.append("| --- | --- | --- |")
    for name, each in everything.items():
        columns = zip(each["step"], each["exact_loss"], each["seconds"], strict=True)
        losses = ", ".join(f"{step}: {loss:.3f} ({time:.0f})" for step, loss, time in columns)
        rows.append(f"| {name} | {losses} | {each['last_grad_norm']:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
