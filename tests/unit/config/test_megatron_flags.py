"""A Megatron command line runs unchanged, or is told flag by flag what to write."""

from __future__ import annotations

import shlex

import pytest

from megatron_kvshare.config import Command, PretrainConfig, parse
from megatron_kvshare.config.megatron_flags import MEGATRON_FLAGS, Accepted, Refused
from megatron_kvshare.config.settings import settings_of
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
    ],
)
def test_other_values_of_accepted_flags_are_refused(argv, part):
    with pytest.raises(ConfigError, match=part):
        parse(PretrainConfig, argv.split(), COMMAND)
