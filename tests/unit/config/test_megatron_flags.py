"""A Megatron command line runs unchanged, or is told flag by flag what to write."""

from __future__ import annotations

import shlex

import pytest

from megatron_kvshare.config import Command, PretrainConfig, parse
from megatron_kvshare.config.flags.megatron_flags import MEGATRON_FLAGS, Accepted, Refused
from megatron_kvshare.config.flags.settings import settings_of
from megatron_kvshare.errors import ConfigError

COMMAND = Command(prog="kvshare pretrain", megatron=MEGATRON_FLAGS)

A_MEGATRON_SCRIPT = """
--use-mcore-models --num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632
--num-attention-heads 32
--group-query-attention --num-query-groups 4 --seq-length 2048 --max-position-embeddings 2048
--position-embedding-type rope --rotary-base 10000 --rotary-percent 1.0 --swiglu
--normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear --use-rotary-position-embeddings
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0.0
--init-method-std 0.02 --micro-batch-size 2 --global-batch-size 64 --train-iters 100 --lr 3e-4
--min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0
--adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --bf16 --tensor-model-parallel-size 2
--pipeline-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
--use-distributed-optimizer --overlap-grad-reduce --recompute-granularity full
--recompute-method uniform --recompute-num-layers 1 --mock-data --split 99,1,0
--tokenizer-type NullTokenizer --vocab-size 32000 --make-vocab-size-divisible-by 128
--save runs/x --load runs/x --save-interval 50 --ckpt-format torch_dist --log-interval 1
--log-throughput --tensorboard-dir runs/tb --wandb-project p --eval-interval 50 --eval-iters 2
--seed 1 --no-load-optim --finetune --use-flash-attn --dataloader-type single --no-load-rng
--no-masked-softmax-fusion --distributed-backend nccl --distributed-timeout-minutes 30
--transformer-impl local --exit-on-missing-checkpoint --attention-softmax-in-fp32
--accumulate-allreduce-grads-in-fp32
"""


def test_a_megatron_command_line_runs_unchanged():
    config = parse(PretrainConfig, shlex.split(A_MEGATRON_SCRIPT), COMMAND)
    assert config.model.num_query_groups == 4
    assert config.parallel.sequence_parallel


def test_no_flag_is_both_a_setting_and_a_megatron_flag():
    assert not {setting.name for setting in settings_of(PretrainConfig)} & set(MEGATRON_FLAGS)


@pytest.mark.parametrize("name", [n for n, e in MEGATRON_FLAGS.items() if isinstance(e, Refused)])
def test_every_refused_flag_gets_a_reason_and_a_fix(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError) as caught:
        parse(PretrainConfig, [flag, "2"], COMMAND)
    (fault,) = caught.value.faults
    assert fault.where == flag
    assert fault.rule and fault.fix
    assert "no such flag" not in fault.rule


@pytest.mark.parametrize("name", [n for n, e in MEGATRON_FLAGS.items() if isinstance(e, Accepted)])
def test_every_accepted_flag_changes_nothing(name):
    entry = MEGATRON_FLAGS[name]
    values = ["3"] if entry.values is None else list(entry.values[:1])
    argv = ["--" + name.replace("_", "-"), *values]
    assert parse(PretrainConfig, argv, COMMAND) == PretrainConfig()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--normalization LayerNorm", "write --normalization RMSNorm or leave it out"),
        ("--position-embedding-type learned_absolute", "rotary embeddings only"),
        ("--ckpt-format zarr", "write --ckpt-format torch_dist"),
        ("--swiglu yes", "it is a switch and takes no value"),
        ("--normalization", "write --normalization RMSNorm"),
        ("--optimizer sgd", "AdamW"),
        ("--attention-dropout 0.1", "use --attention-dropout 0 or leave it out"),
        ("--hidden-dropout 1e-9", "dropout is not supported"),
        ("--hidden-dropout nan", "dropout is not supported"),
        ("--hidden-dropout 0 0", "dropout is not supported"),
        ("--context-parallel-size 2", "spread the model with --tensor-model-parallel-size"),
    ],
)
def test_other_values_of_accepted_flags_are_refused(argv, part):
    with pytest.raises(ConfigError, match=part):
        parse(PretrainConfig, argv.split(), COMMAND)


@pytest.mark.parametrize(
    "argv",
    [
        *("--attention-dropout 0", "--hidden-dropout=0.0", "--hidden-dropout 0e0"),
        *("--context-parallel-size 1", "--rotary-percent 1", "--lr-warmup-init 0.00"),
    ],
)
def test_a_number_that_holds_is_accepted_however_it_is_written(argv):
    assert parse(PretrainConfig, argv.split(), COMMAND) == PretrainConfig()


def test_values_in_a_file_are_judged_like_those_of_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("attention_dropout: 0.0\nhidden_dropout: 0\ncontext_parallel_size: 1\n")
    assert parse(PretrainConfig, ["--config", str(file)], COMMAND) == PretrainConfig()
    file.write_text("attention_dropout: 0.1\ntrain_samples: 9\n")
    with pytest.raises(ConfigError) as caught:
        parse(PretrainConfig, ["--config", str(file)], COMMAND)
    assert [fault.where.split(": ")[-1] for fault in caught.value.faults] == [
        "attention_dropout",
        "train_samples",
    ]


def test_the_last_of_repeated_flags_counts(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("hidden_dropout: 0.1\n")
    argv = ["--config", str(file), "--hidden-dropout", "0"]
    assert parse(PretrainConfig, argv, COMMAND) == PretrainConfig()
    with pytest.raises(ConfigError) as caught:
        parse(PretrainConfig, [*argv, "--hidden-dropout", "0.2"], COMMAND)
    (fault,) = caught.value.faults
    assert (fault.where, fault.value) == ("--hidden-dropout", "0.2")
