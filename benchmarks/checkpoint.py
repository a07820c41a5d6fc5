"""How long a save stops the training: at once, and with --async-save.

    python benchmarks/checkpoint.py [--rounds 7] [--threads 1] [--folder DIR] [--json FILE]

One process trains the 12-layer model of benchmarks/train_step.py. Every round saves the same state
at once, then beside the training, so that both meet the same disk and the same load of the machine.
"stall" is the time the training stands still, "ratio" that of --async-save over saving at once, all
medians over rounds. "bound" is the state's bytes over the speed at which this machine copies them
in memory: no copy stops the training for less. "meanwhile" is what steps beside the writing take
over other steps: they share cores and memory with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from train_step import MODEL, VOCAB

from megatron_kvshare.checkpoint.parts import Part
from megatron_kvshare.checkpoint.save import Saver
from megatron_kvshare.config import (
    CheckpointConfig,
    DataConfig,
    ParallelConfig,
    PretrainConfig,
    SharingConfig,
    TrainConfig,
)
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.saving import save, settle
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.step import train_step

TARGET = 0.15
"""Largest stall of --async-save over that of saving at once."""
STEPS = 4
"""Measured without a save in each round."""


@dataclass(frozen=True)
class Round:
    """Seconds; ``beside``: from the start of a save beside the training to its end."""

    at_once: float
    stall: float
    beside: float
    step: float
    step_meanwhile: float


def config_of(folder: Path) -> PretrainConfig:
    return PretrainConfig(
        model=replace(MODEL, vocab_size=VOCAB),
        sharing=SharingConfig(),
        parallel=ParallelConfig(),
        data=DataConfig(mock_data=True),
        train=TrainConfig(micro_batch_size=1, train_iters=10_000, eval_iters=0),
        checkpoint=CheckpointConfig(save=str(folder)),
    )


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def one_round(run: Run, savers: tuple[Saver, Saver], step: Callable[[], None]) -> Round:
    """Train, save at once, train, save beside the training."""
    run.saver = savers[0]
    alone = [timed(step) for _ in range(STEPS)]
    at_once = timed(lambda: save(run))
    run.saver = savers[1]
    start = time.perf_counter()
    stall = timed(lambda: save(run))
    meanwhile = []
    while run.saver.is_busy:
        meanwhile.append(timed(step))
        stall += timed(lambda: settle(run))
    beside = time.perf_counter() - start
    return Round(at_once, stall, beside, statistics.median(alone), statistics.median(meanwhile))


def copy_seconds(parts: list[Part]) -> float:
    """The state copied in memory that is already there, best of some."""
    copies = [part.data.clone() for part in parts]

    def copy() -> None:
        for part, there in zip(parts, copies, strict=True):
            there.copy_(part.data)

    return min(timed(copy) for _ in range(9))


def summary(rounds: list[Round], num_bytes: int, bound: float) -> dict[str, Any]:
    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    ratio = median(lambda each: each.stall / each.at_once)
    return {
        "megabytes": num_bytes / 1e6,
        "at_once_seconds": median(lambda each: each.at_once),
        "stall_seconds": median(lambda each: each.stall),
        "ratio": ratio,
        "target": TARGET,
        "reached": ratio <= TARGET,
        "bound_seconds": bound,
        "copy_gigabytes_per_second": num_bytes / 1e9 / bound,
        "beside_seconds": median(lambda each: each.beside),
        "step_seconds": median(lambda each: each.step),
        "meanwhile": median(lambda each: each.step_meanwhile / each.step),
    }


def measure(folder: Path, rounds: int) -> tuple[dict[str, Any], list[Round]]:
    state = parallel.initialize(backend="gloo")
    run = prepare(RunPlan.of(config_of(folder), state.world_size), state)
    settings = replace(run.config.checkpoint, keep_last=1)
    savers = (Saver(settings, state), Saver(replace(settings, async_save=True), state))
    batches = run.data.train_batches(0)

    def step() -> None:
        number = run.progress.step + 1
        train_step(run, batches, number)
        run.progress = replace(run.progress, step=number)

    one_round(run, savers, step)  # finds its memory, and is dropped
    found = [one_round(run, savers, step) for _ in range(rounds)]
    parts = run.engine.state_shards(with_optimizer=True)
    num_bytes = sum(part.data.numel() * part.data.element_size() for part in parts)
    result = summary(found, num_bytes, copy_seconds(parts))
    for saver in savers:
        saver.close()
    parallel.destroy()
    return result, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where to save (default: a temporary folder)")
    parser.add_argument("--json", help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result, rounds = measure(Path(folder), arguments.rounds)
    for name, value in result.items():
        print(f"{name:28}{value:.4g}" if isinstance(value, float) else f"{name:28}{value}")
    if arguments.json:
        setting = {"threads": arguments.threads, "rounds": arguments.rounds}
        setting |= {"torch": torch.__version__, "machine": platform.machine()}
        content_ = {"setting": setting, "result": result, "rounds": [asdict(r) for r in rounds]}
        Path(arguments.json).write_text(json.dumps(content_, indent=1) + "\n")


if __name__ == "__main__":
    main()
