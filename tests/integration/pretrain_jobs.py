"""Whole pretraining runs inside the long-lived workers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import shlex
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from megatron_kvshare.checkpoint.recipe import with_recipe_of_checkpoint
from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import KVShareError
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT, ModelOutput
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.agreement import StopWish
from megatron_kvshare.train.loop import train
from megatron_kvshare.train.metrics import Metrics
from megatron_kvshare.train.pretrain import pretrain
from megatron_kvshare.train.profiling import Profiling
from megatron_kvshare.train.report import Typed
from megatron_kvshare.train.saving import save
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.sinks import Record
from tests.distributed.world import Layout

SMALL = shlex.split(
    "--mock-data --vocab-size 100 --num-layers 4 --hidden-size 32 --ffn-hidden-size 48"
    " --num-attention-heads 4 --num-query-groups 2 --seq-length 32 --kv-pattern sandwich-top"
    " --kv-layers 3 --train-iters 6 --micro-batch-size 2 --global-batch-size 8 --lr 1e-2"
    " --eval-iters 1 --eval-interval 4 --log-interval 1 --peak-tflops 1"
)

MAPS = {
    "standard": ["--kv-pattern", "standard", "--kv-layers", "4"],
    "bottom": ["--kv-pattern", "pizza-bottom", "--kv-layers", "2"],
    "cyclic": [],
}
"""One of each kind, as flags after those of `SMALL`."""


class Accident(NamedTuple):
    """What happens in training forward number `call` (from 1) on one rank: its loss becomes "nan"
    or a "spike", or the process and all it started get a signal."""

    rank: int
    call: int
    what: str | signal.Signals = "nan"


class Outcome(NamedTuple):
    """What one rank saw: its closing state, or the error or exit code it left with; what it printed
    as `output` and as `warnings`."""

    step: int = 0
    skipped_steps: int = 0
    output: str = ""
    error: str = ""
    stopped_by: str = ""
    warnings: str = ""


def run_pretrain(
    state: ParallelState, layout: Layout, flags: list[str], accident: Accident | None = None
) -> Outcome:
    """A run of `SMALL` with more flags."""
    # Loaders are children, which a daemon (a test's worker) may not have.
    multiprocessing.current_process()._config["daemon"] = False
    output, warnings = io.StringIO(), io.StringIO()
    printed = contextlib.ExitStack()
    printed.enter_context(contextlib.redirect_stdout(output))
    printed.enter_context(contextlib.redirect_stderr(warnings))
    try:
        with printed, happening(state.rank, accident):
            planned = RunPlan.of(config_of(layout, flags), state.world_size)
            run = pretrain(planned, state, Typed(["kvshare", "pretrain", *flags], ["kvshare"]))
        left = Outcome(run.progress.step, run.progress.skipped_steps, stopped_by=run.stopped_by)
    except KVShareError as error:
        left = Outcome(error=str(error))
    except SystemExit as leave:
        left = Outcome(error=f"exit {leave.code}")
    return left._replace(output=output.getvalue(), warnings=warnings.getvalue())


def config_of(layout: Layout, flags: list[str]) -> PretrainConfig:
    """`SMALL` on a layout, with more flags; its made-up tokens give way to data."""
    has_data = any("data" in flag and flag.endswith("-path") for flag in flags)
    small = [word for word in SMALL if word != "--mock-data" or not has_data]
    tensor = ["--tensor-model-parallel-size", str(layout.tensor)]
    sequence = ["--sequence-parallel"] if layout.sequence_parallel else []
    stages = ["--pipeline-model-parallel-size", str(layout.pipeline)]
    if layout.virtual > 1:
        stages += ["--num-layers-per-virtual-pipeline-stage", "1"]
    completed = partial(with_recipe_of_checkpoint, say=print)
    return parse_pretrain([*small, *tensor, *sequence, *stages, *flags], completed=completed)


def save_again_and_go_on(state: ParallelState, layout: Layout, flags: list[str]) -> list[Record]:
    """Load from `--load`, save at once to `--save`, then train to the end; returns the log."""
    run = prepare(RunPlan.of(config_of(layout, flags), state.world_size), state)
    save(run, last=True)
    log = Log()
    train(
        run,
        Metrics([log], run.config.train.train_iters, 1.0, 1.0),
        StopWish(None),
        Profiling(run.config, run.state),
    )
    return log.records


class Log:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None: ...


@contextlib.contextmanager
def happening(rank: int, accident: Accident | None) -> Any:
    """Inside, the accident happens on its rank."""
    forward, calls = KVShareGPT.forward, 0

    def with_accident(self: KVShareGPT, *args: Any, **settings: Any) -> ModelOutput:
        nonlocal calls
        output = forward(self, *args, **settings)
        calls += torch.is_grad_enabled()
        if calls != accident.call:
            return output
        if isinstance(accident.what, signal.Signals):
            for process in [*psutil.Process().children(), psutil.Process()]:
                process.send_signal(accident.what)
            return output
        factor = {"nan": math.nan, "spike": 9}[accident.what]
        return output._replace(value=output.value * factor, loss=output.loss * factor)

    if accident is None or accident.rank != rank:
        yield
        return
    KVShareGPT.forward = with_accident
    try:
        yield
    finally:
        KVShareGPT.forward = forward


def set_latest(root: Path, iteration: int) -> None:
    """Make ``iteration`` the checkpoint that the next run continues from."""
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def records(path: Path) -> list[Record]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(path: Path) -> dict[int, float]:
    """Of every logged step."""
    return {each["step"]: each["loss"] for each in records(path) if "loss" in each}
