"""A pretraining run from start to end; process groups are made and destroyed elsewhere."""

from __future__ import annotations

import contextlib
from functools import partial

from megatron_kvshare.costs.cost import train_flops_per_token
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.output import say
from megatron_kvshare.ownership.owner import HEARTBEAT
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train import report
from megatron_kvshare.train.agreement import StopWish, stop_wish, together
from megatron_kvshare.train.loop import train
from megatron_kvshare.train.metrics import Metrics
from megatron_kvshare.train.out_of_memory import within_memory
from megatron_kvshare.train.owning import Owner, owning
from megatron_kvshare.train.peaks import Peak, peak
from megatron_kvshare.train.profiling import Profiling
from megatron_kvshare.train.report import Typed
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.sinks import open_sinks
from megatron_kvshare.train.watchdog import Pulse, watched


def pretrain(
    planned: RunPlan, state: ParallelState, typed: Typed, heartbeat: float = HEARTBEAT
) -> Run:
    """Train and return the run. ``typed`` is the user's command, for the closing words;
    ``heartbeat``: seconds between two signs of life for others that want the same folder."""
    config = planned.config
    with (
        stop_wish(config.train.exit_duration_in_mins) as wish,
        owning(config, state, wish, heartbeat) as owner,
    ):
        pulse = Pulse()
        work = partial(_pretrain, planned, state, typed, wish, pulse, owner)
        return within_memory(work, planned, state, pulse, owner.release)


def _pretrain(
    planned: RunPlan,
    state: ParallelState,
    typed: Typed,
    wish: StopWish,
    pulse: Pulse,
    owner: Owner,
) -> Run:
    run = prepare(planned, state, pulse, owner)
    if state.is_first:
        device = str(state.platform.device)
        say(report.start(planned, run.spec, run.data.plan, device))
        if run.continued is not None:
            say(f"Continuing from {run.continued} at step {run.progress.step:,}.")
        say("")
    with together(state):
        metrics, profiling = _metrics(run), Profiling(run.config, state)
    pulse.beat("starting")
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(profiling.close)
        at_the_end.callback(metrics.close)
        if run.saver is not None:  # before the metrics: a tracker may take its time
            at_the_end.callback(run.saver.close)
        limit = 60 * run.config.parallel.distributed_timeout_minutes
        with watched(pulse, state, limit, owner.release):
            losses = train(run, metrics, wish, profiling)
    with together(state), contextlib.suppress(OSError):
        owner.check()
    if state.is_first:
        say("\n" + report.end(run, losses, typed))
    return run


def _metrics(run: Run) -> Metrics:
    config, state = run.config, run.state
    sinks, most = [], Peak(1.0, "")
    if state.is_first:
        sinks = open_sinks(config, run.progress.step, run.tracking, run.owner)
        dtype = run.engine.stages[0].config.params_dtype
        most = peak(state.platform.device, dtype, config.log.peak_tflops)
        say(f"MFU is of {most.tflops:,.3g} TFLOP/s per device: {most.source}.")
    flops = train_flops_per_token(run.spec.shape, run.plan) / state.world_size
    return Metrics(sinks, config.train.train_iters, flops, most.tflops)
