"""``--profile``: what the device does in a few steps, under Nsight Systems or torch's profiler.

The flags are Megatron's. The steps are numbered as in the log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.output import complain, say


class Profiling:
    """Begins and ends the profile of this rank's steps; does nothing on ranks without one."""

    def __init__(self, config: PretrainConfig, state: ParallelState) -> None:
        log = config.log
        _check(config, state)
        self._steps = range(0)
        if log.profile and state.rank in log.profile_ranks:
            self._steps = range(log.profile_step_start, log.profile_step_end)
        self._last = 0
        self._by_torch = log.use_pytorch_profiler
        self._state = state
        self._folder = trace_folder(config)
        self._open = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a training step."""
        if step == self._steps.start and step in self._steps:
            self._open.enter_context(self._trace() if self._by_torch else _captured_by_nsys())
        with self._range(step):
            yield
        self._last = step
        if step == self._steps.stop - 1 and step in self._steps:
            self.close()

    def close(self) -> None:
        """End a profile that is still open: of a run that stops within its steps."""
        self._open.close()

    def _range(self, step: int) -> contextlib.AbstractContextManager[object]:
        if step not in self._steps:
            return contextlib.nullcontext()
        if self._by_torch:
            return torch.profiler.record_function(f"step {step}")
        return torch.cuda.nvtx.range(f"step {step}")

    @contextlib.contextmanager
    def _trace(self) -> Iterator[None]:
        on_gpu = self._state.platform.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]
        with profile(activities=activities, record_shapes=True) as profiler:
            yield
        first, last, rank = self._steps.start, self._last, self._state.rank
        path = self._folder / f"steps-{first}-{last}-rank-{rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            complain(f"warning: the profile of rank {rank} could not be written: {error}")
        else:
            say(f"Profile of steps {first} to {last} on rank {rank}: {path}")


def _check(config: PretrainConfig, state: ParallelState) -> None:
    """What only the job itself knows.

    Raises:
        ConfigError: there is no such rank, or nothing that the profiler could see.
    """
    log, faults = config.log, []
    if log.profile and not log.use_pytorch_profiler and state.platform.device.type != "cuda":
        rule = "without a GPU there is nothing for nsys to capture"
        faults.append(Fault("--profile", "given", rule, "add --use-pytorch-profiler"))
    beyond = [rank for rank in log.profile_ranks if rank >= state.world_size]
    if log.profile and beyond:
        rule = f"the ranks of this job are 0 to {state.world_size - 1}"
        fix = "leave them out of --profile-ranks"
        faults.append(Fault("--profile-ranks", " ".join(map(str, beyond)), rule, fix))
    if faults:
        raise ConfigError(*faults)


@contextlib.contextmanager
def _captured_by_nsys() -> Iterator[None]:
    """``nsys profile --capture-range=cudaProfilerApi`` records what is inside, with every operation
    of autograd as a range."""
    torch.cuda.cudart().cudaProfilerStart()
    try:
        with torch.autograd.profiler.emit_nvtx():
            yield
    finally:
        torch.cuda.cudart().cudaProfilerStop()


def trace_folder(config: PretrainConfig) -> Path:
    """Beside TensorBoard's events if there are any, else beside the checkpoints."""
    if config.log.tensorboard_dir:
        return Path(config.log.tensorboard_dir)
    return Path(config.checkpoint.save or "", "profile")
