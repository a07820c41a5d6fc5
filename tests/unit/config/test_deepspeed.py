"""DeepSpeed's file and flags: what is wrong is told key by key, all at once; what is right is
handed on with every value written out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_kvshare.config import DeepSpeedConfig, PretrainConfig
from megatron_kvshare.config.deepspeed import deepspeed_json
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.spec.run_plan import RunPlan

BASE = "--mock-data --vocab-size 100"
Check = Callable[..., PretrainConfig]


@pytest.fixture
def check(tmp_path: Path, monkeypatch) -> Check:
    """Parse a command line that names a file with this content, for so many processes."""
    monkeypatch.chdir(tmp_path)

    def run(content: Any, argv: str = "", processes: int = 1) -> PretrainConfig:
        text = content if isinstance(content, str) else json.dumps(content)
        Path("ds.json").write_text(text, encoding="utf-8")
        line = f"{BASE} --deepspeed --deepspeed_config ds.json {argv}"
        return parse_pretrain(shlex.split(line), {"WORLD_SIZE": str(processes)})

    return run


@pytest.fixture
def faults(check: Check) -> Callable[..., tuple[Fault, ...]]:
    def run(content: Any, argv: str = "", processes: int = 1) -> tuple[Fault, ...]:
        with pytest.raises(ConfigError) as caught:
            check(content, argv, processes)
        return caught.value.faults

    return run


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 1, **keys}}


FILES = [
    ("", "--deepspeed-config", "line 1, column 1"),
    ("[1]", "--deepspeed-config", "it must hold one object"),
    ('{"a": 1', "--deepspeed-config", "not valid JSON"),
    ('{"a": 1,}', "--deepspeed-config", "remove that comma"),
    ('{\n  // ZeRO\n  "steps_per_print": 1\n}', "--deepspeed-config", "comments are not JSON"),
    ('{"steps_per_print": 1 # often\n}', "--deepspeed-config", "comments are not JSON"),
    ('{"steps_per_print": 1, "steps_per_print": 2}', "--deepspeed-config", "steps_per_print"),
    ('{"zero_optimization": {"stage": 1, "stage": 2}}', "--deepspeed-config", "stage is there twi"),
    ('{"gradient_clipping": NaN}', "--deepspeed-config", "NaN is no number"),
    ('{"gradient_clipping": ' + "1" * 5000 + "}", "--deepspeed-config", "digits"),
    ("[" * 100_000, "--deepspeed-config", "nested too deeply"),
    ('{"a": "' + "x" * (1 << 20) + '"}', "--deepspeed-config", "larger than 1024 KiB"),
    ("\udcff", "--deepspeed-config", "not UTF-8"),
]
"""Files that cannot be read: the fault's place, and a part of its message."""

KEYS = [
    ({"zero_optimisation": {"stage": 1}}, "ds.json: zero_optimisation", "zero_optimization?"),
    (zero(reduce_bucket=5), "ds.json: zero_optimization.reduce_bucket", "reduce_bucket_size?"),
    ({"reduce_bucket_size": 5}, "ds.json: reduce_bucket_size", "move it to zero_optimization"),
    (zero(bf16={}), "ds.json: zero_optimization.bf16", "move it to the top of the file"),
    ({"nothing_like_it": 1}, "ds.json: nothing_like_it", "remove it"),
    ({"zero_optimization": True}, "ds.json: zero_optimization", 'write {"stage": 1}'),
    ({"zero_optimization": 2}, "ds.json: zero_optimization", "it must be a section"),
    ({"bf16": True}, "ds.json: bf16", "it must be a section"),
    ({"zero_optimization": {"stage": 4}}, "ds.json: zero_optimization.stage", "from 0 to 3"),
    ({"zero_optimization": {"stage": "2"}}, "ds.json: zero_optimization.stage", "whole number"),
    ({"zero_optimization": {"stage": True}}, "ds.json: zero_optimization.stage", "whole number"),
    (zero(reduce_bucket_size="5e8"), "ds.json: zero_optimization.reduce_bucket_size", "whole numb"),
    (zero(reduce_bucket_size=0), "ds.json: zero_optimization.reduce_bucket_size", "at least 1"),
    (zero(reduce_bucket_size=1.5), "ds.json: zero_optimization.reduce_bucket_size", "whole number"),
    (zero(reduce_bucket_size=10**400), "ds.json: zero_optimization.reduce_bucket_size", "whole"),
    ({"train_batch_size": 10**18}, "ds.json: train_batch_size", "to 2147483647"),
    (
        '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e999}}',
        "ds.json: zero_optimization.reduce_bucket_size",
        "whole",
    ),
    ({"gradient_clipping": 10**400}, "ds.json: gradient_clipping", "a number"),
    (zero(overlap_comm="true"), "ds.json: zero_optimization.overlap_comm", "true or false"),
    (zero(overlap_comm=1), "ds.json: zero_optimization.overlap_comm", "true or false"),
    ({"gradient_clipping": "1"}, "ds.json: gradient_clipping", "a number"),
    ({"gradient_clipping": -1}, "ds.json: gradient_clipping", "at least 0"),
    ({"wall_clock_breakdown": "auto"}, "ds.json: wall_clock_breakdown", "no value to fill in"),
    ({"steps_per_print": "auto"}, "ds.json: steps_per_print", "no value to fill in"),
    (
        zero(round_robin_gradients="auto"),
        "ds.json: zero_optimization.round_robin_gradients",
        "fill",
    ),
    ({"train_batch_size": 0}, "ds.json: train_batch_size", "at least 1"),
    ({"train_micro_batch_size_per_gpu": -2}, "ds.json: train_micro_batch_size_per_gpu", "least 1"),
    ({"communication_data_type": "fp16"}, "ds.json: communication_data_type", "fp32, bf16"),
    (
        zero(stage3_max_live_parameters=5),
        "ds.json: zero_optimization.stage3_max_live_parameters",
        "not heed it at ZeRO stage 1. Fix: remove it, or use stage 3",
    ),
    (
        {"zero_optimization": {"stage": 3, "allgather_bucket_size": 5}},
        "ds.json: zero_optimization.allgather_bucket_size",
        "not heed it at ZeRO stage 3. Fix: remove it, or use stage 2",
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "ds.json: zero_optimization.offload_optimizer",
        "not heed it at ZeRO stage 0. Fix: remove it, or use stage 1",
    ),
    (
        zero(offload_param={"device": "cpu"}),
        "ds.json: zero_optimization.offload_param",
        "use stage 3",
    ),
    (
        zero(prefetch_bucket_size=5, stage=3, stage3_prefetch_bucket_size=6),
        "ds.json: zero_optimization.stage3_prefetch_bucket_size",
        "another name of prefetch_bucket_size",
    ),
    (
        zero(offload_optimizer={"device": "nvme"}),
        "ds.json: zero_optimization.offload_optimizer.device",
        "none or cpu",
    ),
    (
        zero(offload_optimizer={"device": "cpu", "nvme_path": "/nvme"}),
        "ds.json: zero_optimization.offload_optimizer.nvme_path",
        "NVMe",
    ),
    (zero(cpu_offload=True), "ds.json: zero_optimization.cpu_offload", "write offload_optimizer"),
    (
        zero(zero_quantized_gradients=True),
        "ds.json: zero_optimization.zero_quantized_gradients",
        "",
    ),
    (zero(mics_shard_size=4), "ds.json: zero_optimization.mics_shard_size", "has removed it"),
    (
        zero(elastic_checkpoint=True),
        "ds.json: zero_optimization.elastic_checkpoint",
        "another numb",
    ),
    ({"fp16": {"enabled": True}}, "ds.json: fp16.enabled", '"bf16": {"enabled": true}'),
    ({"fp16": {"loss_scal": 0}}, "ds.json: fp16.loss_scal", "did you mean loss_scale?"),
    ({"amp": {"enabled": False}}, "ds.json: amp", "has removed it"),
    ({"torch_autocast": {"enabled": True}}, "ds.json: torch_autocast.enabled", "autocast"),
    (
        {"tensor_parallel": {"autotp_size": 2}},
        "ds.json: tensor_parallel",
        "--tensor-model-parallel",
    ),
    ({"pipeline": {"stages": 2}}, "ds.json: pipeline", "higher ZeRO stage"),
    ({"sequence_parallel_size": 2}, "ds.json: sequence_parallel_size", "--sequence-parallel"),
    ({"expert_parallel": {}}, "ds.json: expert_parallel", "no experts"),
    ({"sparse_attention": {}}, "ds.json: sparse_attention", "has removed it"),
    ({"compression_training": {}}, "ds.json: compression_training", "has removed it"),
    ({"curriculum_learning": {}}, "ds.json: curriculum_learning", "has removed it"),
    ({"data_efficiency": {"enabled": True}}, "ds.json: data_efficiency.enabled", "order of the"),
    ({"tensorboard": {"enabled": True}}, "ds.json: tensorboard.enabled", "--tensorboard-dir"),
    (
        {"activation_checkpointing": {"partition_activations": True}},
        "ds.json: activation_checkpointing.partition_activations",
        "--deepspeed-activation-checkpointing",
    ),
    ({"prescale_gradients": True}, "ds.json: prescale_gradients", "tokens of the global batch"),
    ({"gradient_allreduce_op": "sum"}, "ds.json: gradient_allreduce_op", "tokens of the global"),
    ({"optimizer": {"type": "OneBitAdam"}}, "ds.json: optimizer.type", 'write "AdamW"'),
    ({"optimizer": {"params": {"lr": 1e-3}}}, "ds.json: optimizer.type", "without a type"),
    (
        {"optimizer": {"type": "Lamb", "params": {"max_coeff": 1}}},
        "ds.json: optimizer.type",
        "the optimizer is AdamW",
    ),
    (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        "ds.json: optimizer.params.adam_w_mode",
        "AdamW's",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}},
        "ds.json: optimizer.params.betas",
        "two numbers",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1.5]}}},
        "ds.json: optimizer.params.betas",
        "below 1",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0}}},
        "ds.json: optimizer.params.lr",
        "above 0",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
        "ds.json: optimizer.params.max_grad_norm",
        "gradient_clipping",
    ),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0}}},
        "ds.json: scheduler.type",
        "",
    ),
    ({"scheduler": {"type": "WarmupLr2"}}, "ds.json: scheduler.type", 'write "WarmupLR"'),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}},
        "ds.json: scheduler.params.warmup_type",
        "linear",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}}},
        "ds.json: scheduler.params.warmup_min_lr",
        "starts at 0",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
        "ds.json: scheduler.params.total_num_steps",
        "no such key",
    ),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "ds.json: data_types.grad_accum_dtype", "fp32"),
    (
        {"data_types": {"grad_accum_dtype": "fp64"}},
        "ds.json: data_types.grad_accum_dtype",
        "one of",
    ),
    ({"checkpoint": {"load_universal": True}}, "--universal-checkpoint", "leave it out"),
    (
        {"checkpoint": {"use_node_local_storage": True}},
        "ds.json: checkpoint.use_node_local_sto",
        "",
    ),
]
"""Keys that are wrong: the fault's place begins so, and a part of its message."""

CONFLICTS = [
    ({"bf16": {"enabled": True}}, "--config run.yaml", "run.yaml:1: bf16", "enabled is True"),
    ({"bf16": {"enabled": False}}, "--bf16 --zero-stage 1", "--bf16", "bf16.enabled is False"),
    ({"gradient_clipping": 0.5}, "--clip-grad 1.0", "--clip-grad", "gradient_clipping is 0.5"),
    (zero(), "--zero-stage 2", "--zero-stage", "zero_optimization.stage is 1"),
    (
        zero(offload_optimizer={"device": "none"}),
        "--zero-offload cpu",
        "--zero-offload",
        "device is 'none'",
    ),
    ({"vocabulary_size": 128}, "", "--vocab-size", "vocabulary_size is 128"),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        "--lr 4e-4",
        "--lr",
        "optimizer.params.lr is 0.001",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
        "--adam-beta2 0.95",
        "--adam-beta2",
        "betas is [0.9, 0.999]",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0}}},
        "--weight-decay 0.1",
        "--weight-decay",
        "weight_decay is 0",
    ),
    (
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}},
        },
        "",
        "ds.json: optimizer.params.lr",
        "warmup_max_lr is 0.002",
    ),
    (
        {"scheduler": {"type": "WarmupDecayLR"}},
        "--lr-decay-style cosine",
        "--lr-decay-style",
        "scheduler.type is 'WarmupDecayLR'",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}},
        "--lr-warmup-fraction 0.1 --train-iters 50",
        "--lr-warmup-fraction",
        "warmup_num_steps is 7",
    ),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1}}},
        "--lr 1e-3 --min-lr 1e-5",
        "--min-lr",
        "cos_min_ratio is 0.1",
    ),
    ({"train_batch_size": 8}, "--global-batch-size 16", "--global-batch-size", "size is 8"),
    ({"train_micro_batch_size_per_gpu": 2}, "--micro-batch-size 4", "--micro-batch-size", "is 2"),
    ({}, "--bf16", "--zero-stage", "use --zero-stage 1"),
    ({}, "--zero-offload cpu", "--zero-offload", "add --zero-stage 1"),
    ({}, "--engine megatron", "--deepspeed", "--engine is megatron"),
    (
        {},
        "--recompute-granularity selective --deepspeed-activation-checkpointing",
        "--deepspeed-activation-checkpointing",
        "granularity is selective",
    ),
    ({}, "--use-distributed-optimizer", "--use-distributed-optimizer", "use --zero-stage 1"),
    ({}, "--overlap-grad-reduce", "--overlap-grad-reduce", "overlap_comm"),
    ({}, "--context-parallel-size 2", "--context-parallel-size", "not supported"),
    ({}, "--load-tag global_step5", "--load-tag", "add --load"),
    ({}, "--universal-checkpoint", "--universal-checkpoint", "leave it out"),
    ({}, "--partition-activations", "--partition-activations", "--deepspeed-activation-checkpoint"),
    ({}, "--cpu-optimizer", "--cpu-optimizer", "--zero-offload cpu"),
    ({}, "--zero-stage 4", "--zero-stage", "from 0 to 3"),
    ({}, "--zero-offload nvme", "--zero-offload", "one of cpu"),
]
"""Files and flags that do not fit: the fault's place, and a part of its message."""


@pytest.mark.parametrize(("text", "where", "part"), FILES, ids=range(len(FILES)))
def test_a_file_that_cannot_be_read_is_one_fault(tmp_path, monkeypatch, text, where, part):
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        parse_pretrain(shlex.split(f"{BASE} --deepspeed --deepspeed_config ds.json"), {})
    (fault,) = caught.value.faults
    assert (fault.where, fault.value) == (where, "ds.json")
    assert part in str(fault)


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_a_file_that_is_not_there_is_one_fault(path):
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        parse_pretrain(shlex.split(f"{BASE} --deepspeed --deepspeed-config {path}"), {})
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(("content", "where", "part"), KEYS, ids=range(len(KEYS)))
def test_a_wrong_key_is_one_fault(faults, content, where, part):
    (fault,) = faults(content)
    assert fault.where.startswith(where)
    assert part in str(fault) and fault.rule and fault.fix


@pytest.mark.parametrize(("content", "argv", "where", "part"), CONFLICTS, ids=range(len(CONFLICTS)))
def test_what_contradicts_the_file_is_one_fault(faults, tmp_path, content, argv, where, part):
    (tmp_path / "run.yaml").write_text("bf16: false\nzero_stage: 1\n")
    (fault,) = faults(content, argv)
    assert fault.where == where
    assert part in str(fault)


STAGES = "--pipeline-model-parallel-size 2"


def test_pipeline_stages_are_refused_with_the_way_out(faults):
    (fault,) = faults({}, STAGES, processes=2)
    assert fault.where == "--pipeline-model-parallel-size"
    assert "--tensor-model-parallel-size or a higher --zero-stage" in fault.fix


def test_all_faults_of_file_and_flags_come_at_once(faults):
    content = {
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2, "stage3_prefetch_bucket_siz": 5, "overlap_comm": "yes"},
        "train_batch_size": 12,
        "gradient_accumulation_steps": 5,
        "optimizer": {"type": "Lion"},
        "gradient_clipping": 2,
    }
    argv = f"--micro-batch-size 1 --clip-grad 1 --zero-stage 1 --lr 0 --load-tag a/b {STAGES}"
    found = {fault.where for fault in faults(content, argv, processes=8)}
    assert found == {
        "ds.json: fp16.enabled",
        "ds.json: zero_optimization.stage3_prefetch_bucket_siz",
        "ds.json: zero_optimization.overlap_comm",
        "ds.json: train_batch_size",
        "ds.json: optimizer.type",
        "--clip-grad",
        "--zero-stage",
        "--lr",
        "--load-tag",
        "--pipeline-model-parallel-size",
    }


@pytest.mark.parametrize(
    "flags",
    [
        *("--deepspeed-config x.json", "--zero-stage 0", "--zero-offload cpu", "--load-tag t"),
        *("--universal-checkpoint", "--deepspeed-activation-checkpointing"),
    ],
)
def test_flags_of_deepspeed_need_deepspeed(flags):
    with pytest.raises(ConfigError) as caught:
        parse_pretrain(shlex.split(f"{BASE} {flags}"), {})
    (fault,) = caught.value.faults
    assert fault.where == flags.split()[0] and "add --deepspeed" in fault.fix


BATCHES = [
    # file, flags, processes -> global batch, micro-batch, accumulation
    ((None, None, None), "", 4, (4, 1, 1)),
    ((32, 4, 2), "", 4, (32, 4, 2)),
    ((32, 4, None), "", 4, (32, 4, 2)),
    ((32, None, 2), "", 4, (32, 4, 2)),
    ((None, 4, 2), "", 4, (32, 4, 2)),
    ((32, None, None), "", 4, (32, 8, 1)),
    ((None, 4, None), "", 4, (16, 4, 1)),
    ((None, None, 2), "", 4, (8, 1, 2)),
    (("auto", "auto", "auto"), "--global-batch-size 32", 4, (32, 1, 8)),
    (("auto", "auto", "auto"), "--global-batch-size 32 --micro-batch-size 4", 4, (32, 4, 2)),
    ((32, "auto", "auto"), "--micro-batch-size 4", 4, (32, 4, 2)),
    ((32, "auto", "auto"), "", 4, (32, 1, 8)),
    ((32, None, "auto"), "", 4, (32, 8, 1)),
    (("auto", 4, 2), "--global-batch-size 32", 4, (32, 4, 2)),
    ((None, None, 2), "--global-batch-size 32", 4, (32, 4, 2)),
    # Tensor-parallel processes see the same data: replicas count, not processes.
    ((16, 4, 2), "--tensor-model-parallel-size 2", 4, (16, 4, 2)),
    ((16, None, None), "--tensor-model-parallel-size 2", 4, (16, 8, 1)),
    ((None, 4, 2), "--tensor-model-parallel-size 4", 4, (8, 4, 2)),
]


def batch(numbers: tuple[Any, Any, Any]) -> dict[str, Any]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {name: value for name, value in zip(names, numbers, strict=True) if value is not None}


@pytest.mark.parametrize(("numbers", "argv", "processes", "wanted"), BATCHES)
def test_two_numbers_of_the_batch_say_the_third(check, numbers, argv, processes, wanted):
    planned = RunPlan.of(check(batch(numbers), argv, processes), processes)
    told = planned.deepspeed
    assert told is not None
    assert tuple(told[name] for name in batch((0, 0, 0))) == wanted
    layout, micro = planned.batch, planned.config.train.micro_batch_size
    assert (layout.global_batch_size, micro, layout.num_microbatches) == wanted


@pytest.mark.parametrize(
    ("numbers", "argv", "processes", "wanted"),
    [
        ((64, 4, 2), "", 4, "x 4 data-parallel replicas = 32"),
        # By processes it would fit.
        ((32, 4, 2), "--tensor-model-parallel-size 2", 4, "x 2 data-parallel replicas = 16"),
        ((33, None, None), "", 4, "8 x 1 steps"),
        ((33, 4, None), "", 4, "= 32"),
        ((None, 4, 3), "--global-batch-size 32", 4, "= 48"),
        ((None, None, 3), "--global-batch-size 32 --micro-batch-size 4", 4, "= 48"),
    ],
)
def test_a_batch_that_does_not_come_out_is_one_fault(faults, numbers, argv, processes, wanted):
    (fault,) = faults(batch(numbers), argv, processes)
    assert wanted in fault.rule
    named = "ds.json: train_batch_size" if numbers[0] else "--global-batch-size"
    assert fault.where == named


def test_a_faulty_flag_of_the_batch_is_told_alone(faults):
    for flag in ("--tensor-model-parallel-size", "--micro-batch-size"):
        (fault,) = faults(batch((8, 4, 2)), f"{flag} x", 2)
        assert fault.where == flag


def test_a_dry_run_of_one_process_says_how_to_plan_for_the_batch(faults):
    (fault,) = faults(batch((64, 4, 2)), "--dry-run --tensor-model-parallel-size 2", 2)
    assert "WORLD_SIZE=16 before the command" in fault.fix


def test_settings_that_nobody_gave_are_the_files(check):
    content = {
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {
            "type": "adam",
            "params": {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"warmup_num_steps": 5, "total_num_steps": 90, "cos_min_ratio": 0.1},
        },
    }
    config = check(content, "--train-iters 100")
    train = config.train
    assert config.model.bf16 and config.deepspeed.engine == "deepspeed"
    assert (config.deepspeed.zero_stage, config.deepspeed.zero_offload) == (2, "cpu")
    assert (train.lr, train.min_lr, train.clip_grad) == (1e-3, 1e-4, 0.5)
    assert (train.adam_beta1, train.adam_beta2, train.adam_eps) == (0.8, 0.9, 1e-7)
    assert (train.weight_decay, train.lr_decay_style) == (0.0, "cosine")
    assert (train.warmup_iters, train.decay_iters) == (5, 90)
    assert RunPlan.of(config, 1).config == config


def test_the_same_said_twice_is_no_conflict(check):
    content = {
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"cos_min_ratio": 0.1, "warmup_num_steps": 10, "warmup_type": "linear"},
        },
    }
    argv = "--clip-grad 1.0 --lr 0.0003 --min-lr 3e-5 --lr-decay-style cosine"
    check(content, f"{argv} --train-iters 100 --lr-warmup-fraction 0.1")


TRANSFORMERS = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The example of transformers' documentation, which many begin with."""


def test_auto_is_filled_in_wherever_it_may_stand(check):
    config = check(
        TRANSFORMERS, "--bf16 --lr-warmup-iters 5 --hidden-size 640 --global-batch-size 8"
    )
    planned = RunPlan.of(config, 1)
    assert planned.deepspeed is not None
    assert "auto" not in json.dumps(planned.deepspeed)
    section = planned.deepspeed["zero_optimization"]
    assert section["reduce_bucket_size"] == 640 * 640
    assert section["stage3_prefetch_bucket_size"] == 368_640  # 0.9 of it
    assert section["stage3_param_persistence_threshold"] == 6400
    assert section["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert planned.deepspeed["gradient_accumulation_steps"] == 8
    assert config.train.lr_decay_style == "constant"
    unlike, unused = planned.warnings
    assert "has no warmup_type: warm-up is linear" in unlike
    assert "stage3_gather_16bit_weights_on_model_save has no effect" in unused


def test_what_deepspeed_is_told_is_written_out(check):
    content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6}, "dump_state": True}
    told = deepspeed_json(check(content, "--bf16", 2), 2)
    assert told == {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"load_universal": False},
        "dump_state": True,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 5_000_000,
            "use_multi_rank_bucket_allreduce": True,
            "allgather_bucket_size": 500_000_000,
            "overlap_comm": False,
            "ignore_unused_parameters": True,
            "round_robin_gradients": False,
            "parameter_alignment": False,
        },
    }
    assert isinstance(told["zero_optimization"]["reduce_bucket_size"], int)


def test_without_a_file_flags_say_it_all():
    line = f"{BASE} --engine deepspeed --zero_stage 1 --zero-offload cpu"
    told = deepspeed_json(parse_pretrain(shlex.split(line), {}), 1)
    section = told["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert not told["bf16"]["enabled"] and "stage3_max_live_parameters" not in section


def test_megatron_deepspeeds_command_line_is_taken(check):
    argv = "--local_rank=1 --no-pipeline-parallel --deepspeed-activation-checkpointing"
    config = check({"zero_optimization": {"stage": 1}}, argv)
    assert config.model.recompute_granularity == "full"
    yaml = Path("run.yaml")
    yaml.write_text("deepspeed: true\ndeepspeed-config: ds.json\nzero_stage: 1\nmock-data: true\n")
    config = parse_pretrain(["--config", "run.yaml", "--vocab-size", "100"], {})
    assert config.deepspeed.deepspeed_config == "ds.json" and config.deepspeed.zero_stage == 1


def test_a_file_that_has_changed_since_it_was_checked_is_seen(check):
    config = check({"gradient_clipping": 0.5})
    Path("ds.json").write_text('{"gradient_clipping": 0.25}')
    with pytest.raises(ConfigError, match=r"gradient_clipping is 0\.25"):
        RunPlan.of(config, 1)


def test_megatron_core_trains_unless_deepspeed_is_asked_for():
    planned = RunPlan.of(PretrainConfig(), 1)
    assert planned.deepspeed is None and planned.warnings == ()
    asked = PretrainConfig(deepspeed=DeepSpeedConfig(engine="deepspeed"))
    assert RunPlan.of(asked, 1).deepspeed == deepspeed_json(asked, 1)
