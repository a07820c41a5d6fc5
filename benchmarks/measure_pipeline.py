"""One rank of benchmarks/pipeline.py: trains each case and records when it computes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANKS, WARMUP, STEPS = 2, 2, 4
CASES: dict[str, dict[str, Any]] = {
    "standard": {"kv_pattern": "standard"},
    "pizza-bottom": {"kv_pattern": "pizza-bottom", "kv_layers": 3},
    "lasagna-top, local": {"kv_pattern": "lasagna-top", "kv_layers": 4, "kv_forward_sweeps": 1},
    "sandwich-top, jacobi(1, 2)": {
        "kv_pattern": "sandwich-top",
        "kv_layers": 3,
        "kv_forward_sweeps": 1,
    },
    "sandwich-top, two-sweep": {
        "kv_pattern": "sandwich-top",
        "kv_layers": 3,
        "kv_recipe": "two-sweep",
    },
    "sandwich-top, one-sweep": {
        "kv_pattern": "sandwich-top",
        "kv_layers": 3,
        "kv_recipe": "one-sweep",
    },
}


@dataclass(frozen=True)
class Event:
    """A rank computed from ``start`` to ``end`` (seconds): a forward or a backward."""

    rank: int
    forward: bool
    task: int
    microbatch: int
    start: float
    end: float


def config_of(case: dict[str, Any], microbatches: int) -> Any:
    from megatron_kvshare import config

    return config.PretrainConfig(
        model=config.ModelConfig(
            num_layers=8,
            hidden_size=256,
            ffn_hidden_size=688,
            num_attention_heads=8,
            num_query_groups=4,
            seq_length=256,
            vocab_size=1024,
        ),
        sharing=config.SharingConfig(**case),
        parallel=config.ParallelConfig(pipeline_model_parallel_size=RANKS),
        data=config.DataConfig(mock_data=True),
        train=config.TrainConfig(
            micro_batch_size=1, global_batch_size=microbatches, train_iters=100, eval_iters=0
        ),
        log=config.LogConfig(),
    )


def measure_all(microbatches: int, into: Path) -> None:
    import torch
    import torch.distributed as dist

    from megatron_kvshare.megatron_api import parallel
    from megatron_kvshare.spec.run_plan import RunPlan
    from megatron_kvshare.train.setup import prepare
    from megatron_kvshare.train.step import train_step

    torch.set_num_threads(1)
    state = parallel.initialize(pipeline_parallel=RANKS, backend="gloo")
    recorder = Recorder(state.pp_rank)
    recorder.install()
    events: dict[str, list[Any]] = {}
    for name, case in CASES.items():
        run = prepare(RunPlan.of(config_of(case, microbatches), RANKS), state)
        batches = run.data.train_batches(0)
        steps = []
        for number in range(WARMUP + STEPS):
            recorder.events.clear()
            dist.barrier()
            train_step(run, batches, number + 1)
            everyone: list[Any] = [None] * RANKS
            dist.all_gather_object(everyone, list(recorder.events))
            steps.append([event for rank in everyone for event in rank])
        steps = steps[WARMUP:]
        events[name] = min(
            steps, key=lambda step: max(e[5] for e in step) - min(e[4] for e in step)
        )
    if state.is_first:
        into.write_text(json.dumps(events))
    parallel.destroy()


def duration(step: list[Any]) -> float:
    """Seconds from the first start to the last end of recorded events."""
    return max(event[5] for event in step) - min(event[4] for event in step)


class Recorder:
    """Notes when this rank computes, by wrapping what the two kinds of schedules call."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[tuple[Any, ...]] = []
        self.action = (0, 0)

    def install(self) -> None:
        import torch
        from megatron.core.pipeline_parallel import schedules

        from megatron_kvshare.pipeline import executor

        schedules.forward_step = self._counted(schedules.forward_step, True)
        schedules.backward_step = self._counted(schedules.backward_step, False)
        plain_forward, plain_backward = executor.StageExecutor.forward, torch.autograd.backward

        def forward(stage: Any, action: Any, *arguments: Any) -> Any:
            self.action = (action.task, action.microbatch)
            return plain_forward(stage, action, *arguments)

        def backward(stage: Any, action: Any, *arguments: Any) -> Any:
            self.action = (action.task, action.microbatch)
            return executor_backward(stage, action, *arguments)

        executor_backward = executor.StageExecutor.backward
        executor.StageExecutor.forward = forward
        executor.StageExecutor.backward = backward
        executor.run_task = self._timed(executor.run_task, True)
        torch.autograd.backward = self._timed(plain_backward, False)

    def _timed(self, function: Callable[..., Any], forward: bool) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            self.events.append((self.rank, forward, *self.action, start, time.perf_counter()))
            return result

        return timed

    def _counted(self, function: Callable[..., Any], forward: bool) -> Callable[..., Any]:
        """The same for megatron-core's: the task is the stage, microbatches come in order."""

        def counted(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            end = time.perf_counter()
            # torch's own backward, called inside, is part of this event.
            self.events = [e for e in self.events if e[4] < start or e[1] is not False]
            number = sum(e[1] is forward for e in self.events)
            self.events.append((self.rank, forward, self.rank, number, start, end))
            return result

        return counted


if __name__ == "__main__":
    measure_all(int(sys.argv[1]), Path(sys.argv[2]))
