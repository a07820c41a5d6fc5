"""Recipes at a small scale on real text: quality, gap to exact evaluation, prefill.

    python benchmarks/solvers.py [--minutes 60] [--workers 2] [--only sandwich-top]

Trains every run of the table (map x recipe x seed), measures it, and draws the figures. Everything
is resumable: training continues from its last checkpoint under runs/solvers/, what is measured is
kept in docs/solvers/results.json, and a finished run is not repeated. Without --minutes it goes on
until all is done: about ten hours of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import results

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "solvers"
RESULTS = ROOT / "docs" / "solvers" / "results.json"
CONFIG = ROOT / "benchmarks" / "solvers.yaml"
MEASURE = ROOT / "benchmarks" / "measure_solver.py"
LONG = {"seq_length": 2048, "micro_batch_size": 1, "global_batch_size": 1, "eval_iters": 32}
"""The same tokens per step in sequences of 2048: convergence and gap at a longer context."""


@dataclass(frozen=True)
class Trial:
    """One training run; ``recipe`` is the flags that choose it."""

    map: str
    recipe: str
    seed: int
    long: bool = False

    @property
    def name(self) -> str:
        return f"{self.map}.{self.recipe}.seed{self.seed}{'.T2048' * self.long}"

    @property
    def flags(self) -> list[str]:
        kv_layers = [] if self.map == "standard" else ["--kv-layers", "3"]
        long = [word for key, value in LONG.items() for word in (_flag(key), str(value))]
        return [
            *("--kv-pattern", self.map, *kv_layers, *RECIPE_FLAGS[self.recipe]),
            *("--seed", str(self.seed), *(long if self.long else [])),
        ]


RECIPE_FLAGS = {
    "once": [],  # maps without upward layers
    "paper": ["--kv-recipe", "paper"],
    "jacobi-1-2": ["--kv-forward-sweeps", "1", "--kv-backward-sweeps", "2"],
    "two-sweep": ["--kv-recipe", "two-sweep"],
    "one-sweep": ["--kv-recipe", "one-sweep"],
}
CYCLIC = ("two-sweep", "one-sweep", "jacobi-1-2", "paper")
TRIALS = [
    *(Trial("sandwich-top", recipe, 1) for recipe in CYCLIC),
    *(Trial(name, "once", 1) for name in ("standard", "pizza-bottom")),
    *(Trial("sandwich-top", recipe, 2) for recipe in CYCLIC),
    *(Trial("sandwich-middle", recipe, 1) for recipe in CYCLIC),
    Trial("sandwich-top", "one-sweep", 1, long=True),
    *(Trial(name, "once", 2) for name in ("standard", "pizza-bottom")),
    *(Trial("sandwich-middle", recipe, 2) for recipe in CYCLIC),
]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, help="stop training after this long; run again")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * (arguments.minutes or 1e6)
    trials = [trial for trial in TRIALS if arguments.only in trial.name]
    corpus = _corpus()
    with ThreadPoolExecutor(arguments.workers) as workers:
        done = list(workers.map(lambda trial: finish(trial, corpus, deadline), trials))
    print(f"{sum(done)} of {len(trials)} runs finished; results: {RESULTS.relative_to(ROOT)}")
    from solver_figures import draw_all

    draw_all(results.read(RESULTS), RESULTS.parent)


def finish(trial: Trial, corpus: Path, deadline: float) -> bool:
    """Train and measure one run, as far as the time allows."""
    if trial.name in results.read(RESULTS):
        return True
    flags = [*_data_flags(corpus, trial), *trial.flags]
    for work in (
        ["-m", "megatron_kvshare", "pretrain"],
        [str(MEASURE)],
    ):
        left = deadline - time.monotonic()
        if left <= 0 or not _run(trial, [*work, *flags], left):
            return False
    measured = json.loads((RUNS / trial.name / "measured.json").read_text())
    results.keep(RESULTS, trial.name, {**asdict(trial), **measured})
    return True


def _run(trial: Trial, words: list[str], seconds: float) -> bool:
    """One step of a run in a process of its own; its output goes to the run's log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"{trial.name}: {' '.join(words[:3])} ...", flush=True)
    folder = RUNS / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("a") as log:
        try:
            subprocess.run(
                [sys.executable, *words],
                check=True,
                env=environment,
                timeout=seconds,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired:
            return False
        except subprocess.CalledProcessError:
            print(f"{trial.name} failed: see {folder / 'log'}", file=sys.stderr)
            return False
    return True


def _corpus() -> Path:
    script = ROOT / "examples" / "prepare_corpus.sh"
    found = subprocess.run(
        ["bash", script], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return ROOT / found.stdout.split()[-1]


def _data_flags(corpus: Path, trial: Trial) -> list[str]:
    folder = RUNS / trial.name
    return [
        *("--config", str(CONFIG), "--data-path", str(corpus / "corpus_text_document")),
        *("--tokenizer-model", str(corpus / "tokenizer.model")),
        *(
            "--data-cache-path",
            str(folder / "cache"),
            "--metrics-file",
            str(folder / "metrics.jsonl"),
        ),
        *("--save", str(folder / "checkpoint"), "--resume", "auto"),
    ]


if __name__ == "__main__":
    main()
