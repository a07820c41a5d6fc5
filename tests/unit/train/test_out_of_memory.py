"""What counts as memory that ran out, and what is advised for which configuration."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import EXIT_USER_ERROR, OutOfMemoryError
from megatron_kvshare.megatron_api.memory import Shortage, shortage
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.memory_advice import Job, advice
from megatron_kvshare.train.out_of_memory import within_memory
from megatron_kvshare.train.report import mib
from megatron_kvshare.train.watchdog import BUILDING, VALIDATION, Pulse
from tests.integration.short_of_memory import CUDA

NCCL = (
    "NCCL error in: x.cpp:330, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 2 'out of memory'"
)
TRAINING = "forward and backward"
ON_DEVICE = Shortage("CUDA error: out of memory", False, False)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(CUDA),
            "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which"
            " 1.21 GiB is free",
        ),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), "CUDA error: out of memory"),
        (dist.DistBackendError(NCCL), "Cuda failure 2 'out of memory'"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), None),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    ],
)
def test_errors_of_memory_in_their_own_words(error: Exception, said: str | None) -> None:
    found = shortage(error)
    assert found is not None and found.said == (said or str(error))
    assert found.on_host == isinstance(error, MemoryError | OSError)


def test_what_the_allocators_of_the_host_say() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    found = shortage(caught.value)
    assert found is not None and found.on_host and "4000000000000000 bytes" in found.said


@pytest.mark.parametrize(
    "error", [RuntimeError("gloo: connection closed"), ValueError("out of memory"), KeyError(1)]
)
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert shortage(error) is None


def test_pieces_count_where_together_they_are_enough() -> None:
    pieces = shortage(torch.OutOfMemoryError(CUDA))
    few = shortage(torch.OutOfMemoryError(CUDA.replace("3.97 GiB", "300.00 MiB")))
    assert pieces is not None and pieces.fragmented
    assert few is not None and not few.fragmented


def job(flags: str, world_size: int = 1, what: str = TRAINING) -> Job:
    argv = f"--mock-data --vocab-size 32000 {flags}".split()
    config = parse_pretrain(argv, {"WORLD_SIZE": str(world_size)})
    planned = RunPlan.of(config, world_size)
    return Job(planned, planned.spec(32000), what)


def flags_of(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]


def test_advice_for_one_gpu_begins_with_what_costs_least() -> None:
    found = job("--micro-batch-size 8 --bf16")
    assert flags_of(advice(found, ON_DEVICE)) == [
        "--micro-batch-size 4 --global-batch-size 8",
        "--recompute-granularity full",
        "--tensor-model-parallel-size 2 --sequence-parallel on 2 processes",
        "--pipeline-model-parallel-size 2 on 2 processes",
    ]


def test_advice_under_deepspeed_is_what_its_file_leaves_open(tmp_path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}')
    found = job(f"--deepspeed --deepspeed-config {file} --zero-stage 1 --bf16", world_size=4)
    lines = flags_of(advice(found, ON_DEVICE))
    assert lines[:2] == ["--recompute-granularity full", "--zero-stage 2"]
    assert not any("micro-batch" in line or "pipeline" in line for line in lines)
    assert "--use-distributed-optimizer" not in lines


def test_every_piece_of_advice_is_a_run_that_needs_what_it_says() -> None:
    flags = (
        "--micro-batch-size 8 --kv-pattern sandwich-top --kv-layers 11 --kv-recipe paper"
        " --num-query-groups 4"
    )
    found = job(flags, world_size=4)
    lines = advice(found, ON_DEVICE)
    assert flags_of(lines) == [
        "--micro-batch-size 4 --global-batch-size 32",
        "--recompute-granularity full",
        "--use-distributed-optimizer",
        "--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 32",
        "--pipeline-model-parallel-size 2 --global-batch-size 32",
        "--bf16",
        "--kv-recipe two-sweep",
    ]
    for line in lines:
        words, _, rest = line.partition(": ")
        changed = job(f"{flags} {words}", world_size=4)
        memory = changed.planned.memory(changed.spec)
        assert rest.partition(", for")[0].partition(", with")[0].partition(", and")[0] == mib(
            memory.total
        )
        assert memory.total < found.planned.memory(found.spec).total


def test_what_is_in_use_or_impossible_is_not_advised() -> None:
    used = (
        "--bf16 --recompute-granularity full --use-distributed-optimizer --sequence-parallel"
        " --tensor-model-parallel-size 2 --num-layers 21 --num-attention-heads 2"
        " --kv-pattern sandwich-top --kv-layers 11 --kv-recipe two-sweep"
    )
    (only,) = advice(job(used, world_size=4), ON_DEVICE)
    assert "a smaller model" in only


def test_passes_given_one_by_one_are_changed_one_by_one() -> None:
    flags = "--kv-pattern sandwich-top --kv-layers 11 --kv-backward-sweeps 3"
    assert "--kv-backward-sweeps 1" in flags_of(advice(job(flags), ON_DEVICE))


@pytest.mark.parametrize(
    ("what", "helps", "does_not"),
    [
        (VALIDATION, "--micro-batch-size 4 --global-batch-size 8", "--recompute-granularity full"),
        (BUILDING, "--pipeline-model-parallel-size 2 on 2 processes", "--micro-batch-size 4"),
    ],
)
def test_without_backward_there_are_no_activations_to_save(
    what: str, helps: str, does_not: str
) -> None:
    lines = flags_of(advice(job("--micro-batch-size 8 --bf16", what=what), ON_DEVICE))
    assert helps in lines
    assert not any(line.startswith(does_not) for line in lines)


def test_the_allocator_is_advised_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ON_DEVICE._replace(fragmented=True)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    setting = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    assert advice(job(""), pieces)[0].startswith(setting)
    assert not advice(job(""), ON_DEVICE)[0].startswith(setting)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert not advice(job(""), pieces)[0].startswith(setting)


def test_a_host_has_advice_of_its_own() -> None:
    host = Shortage("MemoryError", True, False)
    lines = advice(job("--num-workers 2 --save runs/x --async-save"), host)
    assert lines[0].startswith("no --async-save") and lines[1].startswith("--num-workers 0")
    assert not any("async" in line for line in advice(job(""), host))


def test_a_single_process_raises_the_message(single: ParallelState) -> None:
    (planned, spec, _), pulse = job("--micro-batch-size 2"), Pulse()
    pulse.beat("validation", 7)

    def work() -> Any:
        raise torch.OutOfMemoryError(CUDA)

    with pytest.raises(OutOfMemoryError) as caught:
        within_memory(work, planned, single, pulse)
    assert caught.value.exit_code == EXIT_USER_ERROR and caught.value.__context__ is None
    message = str(caught.value)
    assert message.startswith("out of memory: step 7, validation, rank 0 on cpu = 'Tried to")
    memory = planned.memory(spec)
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert f"{part} {mib(getattr(memory, part))}" in message


def test_other_errors_and_results_pass(single: ParallelState) -> None:
    planned = job("").planned
    assert within_memory(lambda: 5, planned, single, Pulse()) == 5
    with pytest.raises(ZeroDivisionError):
        within_memory(lambda: 1 // 0, planned, single, Pulse())
