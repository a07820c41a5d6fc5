"""Which start is best when a pretrained model becomes a shared-KV one.

    python benchmarks/uptrain.py [--only pizza-bottom]

A real pretrained Llama (benchmarks/pretrained.py) with half of its KV layers, by two maps and every
--kv-init, is trained on for 100 steps of 512 tokens of the embedded corpus; loss on 8,192 tokens of
the validation split before and after. Resumable: training continues from its last checkpoint under
runs/uptrain/, finished runs are kept in docs/uptraining/results.json. About 75 minutes on two
cores. Writes the table to docs/uptraining/table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from pretrained import prepare, shape_flags

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "uptrain"
RESULTS = ROOT / "docs" / "uptraining" / "results.json"
STEPS, KV_LAYERS = 100, 15
RECIPE = ["--kv-recipe", "one-sweep"]
INITS = ("mean", "target", "aligned", "random")
MAPS = ("sandwich-middle", "pizza-bottom")


@dataclass(frozen=True)
class Trial:
    """``init`` None: the model as it is, without sharing."""

    map: str
    init: str | None

    @property
    def name(self) -> str:
        return f"{self.map}.{self.init}" if self.init else self.map

    @property
    def map_flags(self) -> list[str]:
        if self.init is None:
            return []
        flags = ["--kv-pattern", self.map, "--kv-layers", str(KV_LAYERS)]
        return flags + RECIPE if "middle" in self.map else flags


TRIALS = [Trial("standard", None), *(Trial(map, init) for map in MAPS for init in INITS)]
TRAINING = [
    *("--seq-length", "512", "--micro-batch-size", "1", "--global-batch-size", "1"),
    *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-decay-style", "cosine"),
    *("--lr-warmup-fraction", "0.1", "--weight-decay", "0.1", "--clip-grad", "1.0"),
    *("--split", "97,3,0", "--eval-iters", "0", "--log-interval", "5", "--save-interval", "25"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    hf = prepare(ROOT / "runs" / "pretrained")
    data = _data(hf)
    for trial in (trial for trial in TRIALS if arguments.only in trial.name):
        if trial.name not in results.read(RESULTS):
            print(trial.name, flush=True)
            results.keep(RESULTS, trial.name, _run(trial, hf, data))
    (RESULTS.parent / "table.md").write_text(table(results.read(RESULTS)))


def _run(trial: Trial, hf: Path, data: Path) -> dict[str, float]:
    folder = RUNS / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    start, end = folder / "start", folder / "checkpoint"
    if not start.exists():
        init = ["--kv-init", trial.init] if trial.init else []
        _kvshare("convert", "from-hf", "--hf", hf, "--save", start, *init, *trial.map_flags)
    words = [
        *shape_flags(hf),
        *trial.map_flags,
        *TRAINING,
        "--data-path",
        data,
        "--tokenizer-model",
        hf,
    ]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--train-iters", STEPS]
    words += ["--load", start, "--finetune", "--save", end, "--resume", "auto"]
    _kvshare("pretrain", *words, "--metrics-file", folder / "metrics.jsonl")
    return {"before": _loss(start, data, folder), "after": _loss(end, data, folder)}


def _loss(checkpoint: Path, data: Path, folder: Path) -> float:
    """Validation loss by the sweeps of training, over the same tokens for every run."""
    where = ["--data-path", data, "--split", "97,3,0", "--seq-length", 512, "--gap-tokens", 0]
    out = folder / f"scores-{checkpoint.name}"
    _kvshare("evaluate", "--load", checkpoint, *where, "--max-tokens", 8_192, "--output", out)
    rows = json.loads((out / "results.json").read_text())["results"]
    return next(row["value"] for row in rows if row["metric"] == "loss")


def _data(hf: Path) -> Path:
    prefix = RUNS / "corpus"
    if not Path(f"{prefix}_text_document.idx").exists():
        text = sorted((ROOT / "examples" / "data").glob("*.jsonl.xz"))
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", hf]
        _kvshare(
            "preprocess", "--input", *text, "--output-prefix", prefix, "--append-eod", *tokenizer
        )
    return Path(f"{prefix}_text_document")


def _kvshare(*words: object) -> None:
    command = [sys.executable, "-m", "megatron_kvshare", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    with (RUNS / "log").open("a") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)


def table(measured: dict[str, Any]) -> str:
    """Markdown: validation loss before and after, a row for each start."""
    lines = ["| map | start | loss before | after 100 steps |", "| --- | --- | --- | --- |"]
    for trial in TRIALS:
        if trial.name in measured:
            row = measured[trial.name]
            cells = (trial.map, trial.init or "-", f"{row['before']:.4f}", f"{row['after']:.4f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    RUNS.mkdir(parents=True, exist_ok=True)
    main()
