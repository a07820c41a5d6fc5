"""The one path of metrics: a step's results and speed become a record for the sinks."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_kvshare.checkpoint.manifest import Progress
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.train.sinks import Record, Sink

_TERA = 1e12


class Stopwatch:
    """Seconds and tokens of training since the start and since the last lap, pauses left out."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lap_start = clock()
        self._lap_tokens = 0
        self._past_seconds = 0.0
        self.steps = 0

    def add_step(self, tokens: int) -> None:
        """Take note of a finished step."""
        self._lap_tokens += tokens
        self.steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluation, saving) does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._lap_start += self._clock() - start

    def seconds_per_step(self) -> float:
        """Mean over all steps so far; asked for after the first one."""
        return (self._past_seconds + self._clock() - self._lap_start) / self.steps

    def lap(self) -> float:
        """Tokens per second since the last lap; starts a new one."""
        seconds = max(self._clock() - self._lap_start, 1e-9)
        speed = self._lap_tokens / seconds
        self._past_seconds += seconds
        self._lap_start += seconds
        self._lap_tokens = 0
        return speed


class Metrics:
    """Builds records and hands them to the sinks (none on all processes but the first).

    A training record has ``step`` (from 1), ``loss`` (that step's mean over the unmasked tokens of
    its global batch), ``lr``, ``grad_norm`` (before clipping), ``tokens`` (consumed by the whole
    run so far, masked ones included), ``tokens_per_second`` (all devices, since the last record),
    ``tflops`` (per device, of what the sweeps need after skipping), ``mfu``, ``eta_seconds``,
    ``skipped_steps`` and for cyclic maps ``kv_residual`` (of the last sweep) and ``kv_residual_1``,
    ``kv_residual_2``, ... (of every sweep), on GPUs ``memory_allocated_gib`` and
    ``memory_reserved_gib``, see :func:`memory_fields`; ``tokens_by_source``: the same tokens by
    the prefix of their data; ``data_stage``, from 1, where there are several; ``skipped`` is there,
    and true, on a step that changed nothing. A validation record has ``step``, ``valid_loss``,
    ``valid_perplexity`` and for cyclic maps ``valid_kv_gap`` (exact minus iterated loss) and
    ``valid_kv_residual...`` as above; one of test data ``step``, ``test_loss`` and
    ``test_perplexity``. Numbers are not rounded.
    """

    def __init__(
        self, sinks: list[Sink], train_iters: int, flops_per_token: float, peak_tflops: float
    ) -> None:
        """``flops_per_token``: of training, divided by the number of devices."""
        self._sinks = sinks
        self._train_iters = train_iters
        self._flops_per_token = flops_per_token
        self._peak_tflops = peak_tflops
        self.watch = Stopwatch()

    def train(
        self, progress: Progress, loss: float, lr: float, grad_norm: float, **extra: float | None
    ) -> None:
        """Log the step just finished; ``extra`` fields that are None are left out."""
        speed = self.watch.lap()
        tflops = speed * self._flops_per_token / _TERA
        steps_left = self._train_iters - progress.step
        record: Record = {
            "step": progress.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "tokens_per_second": speed,
            "tflops": tflops,
            "mfu": tflops / self._peak_tflops,
            "eta_seconds": steps_left * self.watch.seconds_per_step(),
            "skipped_steps": progress.skipped_steps,
        }
        if progress.tokens_by_source:
            record["tokens_by_source"] = progress.tokens_by_source
        record |= {name: value for name, value in extra.items() if value is not None}
        self._write(record)

    def valid(self, step: int, loss: float, **extra: float | None) -> None:
        """Log an evaluation; ``extra`` fields that are None are left out."""
        record: Record = {"step": step, "valid_loss": loss, "valid_perplexity": perplexity(loss)}
        record |= {f"valid_{name}": value for name, value in extra.items() if value is not None}
        self._write(record)

    def test(self, step: int, loss: float) -> None:
        """Log the evaluation of test data."""
        self._write({"step": step, "test_loss": loss, "test_perplexity": perplexity(loss)})

    def close(self) -> None:
        """Flush and close all sinks."""
        for sink in self._sinks:
            sink.close()

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)


def residual_fields(residuals: Sequence[float]) -> dict[str, float | None]:
    """The sweeps' KV residuals as fields of a record; none if they were not measured."""
    if not residuals:
        return {}
    each = {f"kv_residual_{number}": value for number, value in enumerate(residuals, 1)}
    return {"kv_residual": residuals[-1], **each}


def memory_fields(state: ParallelState) -> dict[str, float | None]:
    """Most GiB that tensors have taken on a GPU since the start, and most that torch has taken from
    the device for them; of the rank that has most. Nothing on a CPU.

    Collective over all ranks.
    """
    device = state.platform.device
    if device.type != "cuda":
        return {}
    peaks = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    most = torch.tensor(peaks, dtype=torch.float64, device=device)
    if state.world_size > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    allocated, reserved = (most / 2**30).tolist()
    return {"memory_allocated_gib": allocated, "memory_reserved_gib": reserved}


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
