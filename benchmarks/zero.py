"""What one rank holds and how long a step takes under each engine and stage of ZeRO, on two ranks.

    python benchmarks/zero.py [--rounds 9] [--bf16] [--json FILE]

Every row is a launch of its own with two CPU ranks of one thread each. It counts the bytes of live
tensors: of weights, of optimizer state with fp32 copies, and of everything else that is alive
between backward and the update (gradients and buffers). Then steps of this engine and of
megatron-core's alternate; the ratio is the median over pairs. Bytes stand beside those of
`kvshare plan`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT, RANKS, WARM_UP = Path(__file__).resolve().parents[1], 2, 2
BUCKET = 1_000_000
"""Gradients that are reduced at a time, in elements."""
ROWS: dict[str, list[str]] = {
    "megatron": [],
    "megatron, distributed optimizer": ["--use-distributed-optimizer"],
    **{
        f"ZeRO {stage}": ["--engine", "deepspeed", "--zero-stage", str(stage)] for stage in range(4)
    },
}
MODEL = """--mock-data --vocab-size 4000 --num-layers 8 --hidden-size 256 --ffn-hidden-size 688
--num-attention-heads 8 --num-query-groups 4 --seq-length 256 --kv-pattern sandwich-top
--kv-layers 3 --micro-batch-size 2 --global-batch-size 8 --train-iters 1000 --eval-iters 0"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="pairs of steps (default: 9)")
    parser.add_argument("--bf16", action="store_true", help="bf16 weights; ZeRO 0 is left out")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "FILE"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    kind = ["--bf16"] if words.bf16 else []
    if words.measure:
        name, file = words.measure
        measure(ROWS[name], kind, words.rounds, Path(file))
        return
    rows = {
        name: launch(name, words.rounds, kind)
        for name in ROWS
        if not (words.bf16 and name == "ZeRO 0")
    }
    report(rows)
    if words.json:
        Path(words.json).write_text(json.dumps(rows, indent=1) + "\n")


def launch(name: str, rounds: int, kind: list[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        run += ["--nproc_per_node", str(RANKS), __file__, "--rounds", str(rounds), *kind]
        subprocess.run(
            [*run, "--measure", name, str(file)], check=True, env=environment, stdout=sys.stderr
        )
        found: dict[str, float] = json.loads(file.read_text())
    return found


def measure(flags: list[str], kind: list[str], rounds: int, file: Path) -> None:
    """One rank of a row."""
    import torch

    from megatron_kvshare.config.pretrain import parse_pretrain
    from megatron_kvshare.megatron_api import parallel
    from megatron_kvshare.spec.run_plan import RunPlan
    from megatron_kvshare.train.setup import prepare
    from megatron_kvshare.train.step import train_step

    torch.set_num_threads(1)
    state = parallel.initialize(backend="gloo")

    def planned(more: list[str]) -> RunPlan:
        return RunPlan.of(parse_pretrain([*MODEL.split(), *more]), RANKS)

    if "deepspeed" in flags and flags[-1] != "0":  # DeepSpeed's own buckets are larger than this
        bucket = file.with_name(f"bucket{state.rank}.json")
        bucket.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
        flags = [*flags, "--deepspeed-config", str(bucket)]
    settings = planned([*flags, *kind])
    before = live(every_tensor())
    run = prepare(settings, state)
    batches = run.data.train_batches(0)
    train_step(run, batches, 1)
    found = held(run, batches, before)
    estimate = settings.memory(run.spec)
    found["estimated"] = estimate.weights + estimate.gradients + estimate.optimizer
    other = prepare(planned(kind), state)
    others = other.data.train_batches(0)
    times: dict[str, list[float]] = {"own": [], "other": []}
    for number in range(2, 2 + WARM_UP + rounds):
        for name, each, stream in (("own", run, batches), ("other", other, others)):
            torch.distributed.barrier()
            start = time.perf_counter()
            train_step(each, stream, number)
            times[name].append(time.perf_counter() - start)
    own, megatron = (each[WARM_UP:] for each in times.values())
    found["milliseconds"] = 1e3 * statistics.median(own)
    found["over_megatron"] = statistics.median(x / y for x, y in zip(own, megatron, strict=True))
    if state.is_first:
        file.write_text(json.dumps(found))
    parallel.destroy()


def held(run: Any, batches: Any, before: set[int]) -> dict[str, float]:
    """Bytes on this rank between backward and the update of a step."""
    from megatron_kvshare.pipeline.runner import Pass

    run.engine.set_learning_rate(2)
    run.engine.forward_backward(batches, Pass(run.plan))
    parameters = [weight for stage in run.engine.stages for weight in stage.parameters()]
    weights = live(getattr(weight, "ds_tensor", weight) for weight in parameters)
    optimizer = live(optimizer_tensors(run.engine), but=weights)  # may be views of the weights
    rest = live(every_tensor(), but={*before, *weights, *optimizer})
    run.engine.update(run.engine.gradient_norm())
    found = {"weights": weights, "optimizer": optimizer, "rest": rest}
    return {name: sum(storages.values()) for name, storages in found.items()}


def optimizer_tensors(engine: Any) -> Iterable[Any]:
    """Moments, and the fp32 weights that are not the weights themselves."""
    import torch

    shares = getattr(engine, "shares", None)
    weights = {id(weight) for stage in engine.stages for weight in stage.parameters()}
    if shares is not None:
        states, mains = shares.adamw.state.values(), shares.flats()
    else:
        inner = [part.optimizer for part in engine.optimizer.chained_optimizers]
        states = [state for each in inner for state in each.state.values()]
        mains = [w for each in inner for group in each.param_groups for w in group["params"]]
    yield from (x for state in states for x in state.values() if torch.is_tensor(x))
    yield from (main for main in mains if id(main) not in weights)


def every_tensor() -> Iterable[Any]:
    import torch

    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]


def live(tensors: Iterable[Any], but: Any = ()) -> dict[int, int]:
    """Bytes by storage, of storages that have memory."""
    storages = (each.untyped_storage() for each in tensors)
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() and s.data_ptr() not in but}


def report(rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="MiB on one of two ranks, and a step over megatron-core's", title_justify="left"
    )
    for heading in ("engine", "weights", "optimizer", "gradients and buffers", "sum", "planned"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for heading in ("ms", "over megatron"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        parts = [row[part] / 2**20 for part in ("weights", "optimizer", "rest")]
        sizes = [f"{each:.1f}" for each in (*parts, sum(parts), row["estimated"] / 2**20)]
        times = (f"{row['milliseconds']:.0f}", f"{row['over_megatron']:.2f}")
        table.add_row(name, *sizes, *times)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
