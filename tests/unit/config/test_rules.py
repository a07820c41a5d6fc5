"""Rules about several settings: each fault names the flag, the rule and a fix that works."""

from __future__ import annotations

import pytest

from megatron_kvshare.config.derive import batch_layout, sharing_map
from megatron_kvshare.config.pretrain import (
    parse_pretrain,
    pretrain_warnings,
    world_size,
)
from megatron_kvshare.errors import ConfigError

BASE = "--mock-data --vocab-size 100"


def check(argv: str, processes: int | None = None):
    environ = {} if processes is None else {"WORLD_SIZE": str(processes)}
    return parse_pretrain(f"{BASE} {argv}".split(), environ)


def faults(argv: str, processes: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(argv, processes)
    return [str(fault) for fault in caught.value.faults]


WRONG = [
    (
        "--hidden-size 100 --num-attention-heads 12",
        "--hidden-size",
        "use --hidden-size 96 or 108, or --num-attention-heads 10",
    ),
    ("--hidden-size 96 --num-attention-heads 32", "--hidden-size", "use --hidden-size 64 or 128"),
    ("--kv-channels 3", "--kv-channels", "use --kv-channels 2 or 4"),
    ("--num-query-groups 5", "--num-query-groups", "use --num-query-groups 4"),
    (
        "--max-position-embeddings 100",
        "--max-position-embeddings",
        "use --max-position-embeddings 2048",
    ),
    (
        "--use-rope-scaling --rope-low-freq-factor 4",
        "--rope-low-freq-factor",
        "--rope-high-freq-factor 4",
    ),
    (
        "--use-rope-scaling --rope-scaling-type yarn",
        "--rope-scaling-type",
        "--use-rope-scaling asks for llama3",
    ),
    (
        "--rope-scaling-type llama3 --rope-low-freq-factor 4",
        "--rope-low-freq-factor",
        "--rope-high-freq-factor 4",
    ),
    ("--rope-scaling-type yarn --yarn-beta-slow 32", "--yarn-beta-slow", "below --yarn-beta-fast"),
    ("--rope-scaling-type yarn --rotary-base 1", "--rotary-base", "above 1"),
    ("--rope-scaling-type dynamic --kv-channels 2", "--rope-scaling-type", "heads wider than 2"),
    ("--yarn-beta-fast 16", "--yarn-beta-fast", "add --rope-scaling-type yarn"),
    (
        "--rope-scaling-type linear --no-yarn-correction-range-round-to-int",
        "--yarn-correction-range-round-to-int",
        "add --rope-scaling-type yarn",
    ),
    ("--recompute-method block", "--recompute-method", "add --recompute-granularity full"),
    (
        "--recompute-granularity selective --recompute-num-layers 2",
        "--recompute-num-layers",
        "full",
    ),
    (
        "--recompute-granularity full --recompute-num-layers 99",
        "--recompute-num-layers",
        "use --recompute-num-layers 22 or less",
    ),
    ("--kv-pattern sandwich-topp --kv-layers 3", "--kv-pattern", "sandwich-top"),
    ("--kv-pattern sandwich-top", "--kv-layers", "from 1 to 22"),
    ("--kv-pattern sandwich-top --kv-layers 23", "--kv-layers", "from 1 to 22"),
    ("--num-layers 4 --kv-map 0_1_1", "--kv-map", "--num-layers 3"),
    ("--num-layers 4 --kv-map 0_1_1_x", "--kv-map", "0_1s_1s_3"),
    ("--num-layers 4 --kv-map 0_0_1_3", "--kv-map", "KV layer"),
    ("--num-layers 4 --kv-map 0_1s_1s_3", "--window-size", "--window-size W"),
    ("--kv-pattern yoco", "--window-size", "--window-size W"),
    (
        "--pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size",
        "--nproc_per_node 2",
    ),
    ("--context-parallel-size 2", "--context-parallel-size", "size 1"),
    ("--overlap-param-gather", "--overlap-param-gather", "add --use-distributed-optimizer"),
    ("--global-batch-size 7 --micro-batch-size 2", "--global-batch-size", "6 or 8"),
    ("--lr 1e-4 --min-lr 1e-3", "--min-lr", "use --min-lr 1e-05"),
    ("--lr-warmup-iters 5 --lr-warmup-fraction 0.1", "--lr-warmup-iters", "only one"),
    (
        "--train-iters 100 --lr-warmup-iters 100",
        "--lr-warmup-iters",
        "use --lr-warmup-iters 1",
    ),
    ("--lr-warmup-fraction 1", "--lr-warmup-fraction", "use --lr-warmup-fraction 0.01"),
    ("--lr-decay-style WSD", "--lr-wsd-decay-iters", "use --lr-wsd-decay-iters 100"),
    (
        "--lr-decay-style WSD --lr-wsd-decay-iters 2000",
        "--lr-wsd-decay-iters",
        "use --lr-wsd-decay-iters 100",
    ),
    ("--hidden-dropout 0.1", "--hidden-dropout", "use --hidden-dropout 0"),
    (
        "--attention-dropout 0.1 --kv-pattern pizza-top --kv-layers 3",
        "--attention-dropout",
        "every sweep would see another mask",
    ),
    ("--split 1,2,3,4", "--split", "969,30,1"),
    ("--split 0,50,50", "--split", "969,30,1"),
    ("--split a,b", "--split", "969,30,1"),
    ("--save-interval 5", "--save-interval", "add --save FOLDER"),
    ("--async-save", "--async-save", "add --save FOLDER"),
    ("--keep-last 2", "--keep-last", "add --save FOLDER"),
    ("--save no/such --keep-every 100", "--keep-every", "add --keep-last N"),
    ("--load no/such/folder", "--load", "drop --load to start fresh"),
    ("--finetune", "--finetune", "add --load FOLDER"),
    ("--load no/such --save no/such", "--load", "write --resume auto instead"),
    ("--resume auto", "--resume", "add --save FOLDER"),
    ("--loss-spike-factor 1", "--loss-spike-factor", ""),
    (
        "--tokenizer-type HuggingFaceTokenizer",
        "--tokenizer-model",
        "add --tokenizer-model FILE_OR_FOLDER",
    ),
    ("--tokenizer-model no/such.model", "--tokenizer-model", "kvshare train-tokenizer"),
]


@pytest.mark.parametrize(("argv", "flag", "fix"), WRONG, ids=[row[0] for row in WRONG])
def test_each_rule(argv, flag, fix):
    (fault,) = faults(argv)
    assert flag in fault
    assert fix in fault


@pytest.mark.parametrize(
    "argv",
    [
        "--num-query-groups 4",
        "--kv-channels 128",
        "--num-query-groups 1 --kv-pattern mlkv:2",
        "--num-layers 4 --kv-map 0_1s_1s_3 --window-size 8",
        "--kv-pattern sandwich-top --kv-layers 11 --kv-forward-sweeps 0 --kv-backward-sweeps 1",
        "--recompute-granularity full",
        "--recompute-granularity selective",
        "--save no/such --resume auto --save-interval 10",
        "--save no/such --async-save --keep-last 3 --keep-every 1000",
        "--lr-decay-style WSD --lr-wsd-decay-iters 100",
        "--attention-dropout 0 --hidden-dropout 0.0",
        "--max-position-embeddings 4096",
        "--overlap-param-gather --use-distributed-optimizer --overlap-grad-reduce",
    ],
)
def test_what_is_allowed(argv):
    check(argv)


def test_subsets_are_whole_on_every_rank():
    layout = "--sequence-parallel --tensor-model-parallel-size 2 --seq-length 100"
    cyclic = f"{layout} --kv-pattern sandwich-top --kv-layers 3"
    (fault,) = faults(f"{cyclic} --kv-recipe two-sweep", 2)
    assert "--kv-stride 4 x --tensor-model-parallel-size 2 = 8" in fault
    assert "use --seq-length 96 or 104" in fault
    check(f"{cyclic} --kv-recipe paper", 2)
    check(f"{layout} --kv-pattern cla:2 --kv-recipe two-sweep", 2)


def warnings_of(argv: str) -> list[str]:
    config = check(argv)
    return pretrain_warnings(config, sharing_map(config.model, config.sharing))


def test_a_recipe_without_effect_is_said():
    (warning,) = [
        text
        for text in warnings_of("--kv-pattern cla:2 --kv-forward-sweeps 0")
        if "no effect" in text
    ]
    assert "--kv-forward-sweeps" in warning
    cyclic = "--kv-pattern sandwich-top --kv-layers 3 --kv-recipe two-sweep"
    assert not any("no effect" in text for text in warnings_of(cyclic))


TENSOR_PARALLEL = "--num-attention-heads 12 --hidden-size 96 --ffn-hidden-size 256 --num-layers 2"


@pytest.mark.parametrize(
    ("argv", "size", "fix"),
    [
        ("", 5, "use --tensor-model-parallel-size 4"),
        ("--num-query-groups 3", 2, "must divide one another"),
        ("--ffn-hidden-size 258", 4, "use --ffn-hidden-size 256 or 260"),
        ("--sequence-parallel --seq-length 130", 4, "use --seq-length 128 or 132"),
        ("--num-query-groups 1 --kv-channels 2", 4, "the width of all KV heads, 2"),
    ],
)
def test_tensor_parallel_sizes(argv, size, fix):
    found = faults(f"{TENSOR_PARALLEL} {argv} --tensor-model-parallel-size {size}", size)
    assert fix in "\n".join(found)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_more_ranks_than_kv_heads_is_fine(groups):
    argv = f"{TENSOR_PARALLEL} --num-query-groups {groups} --tensor-model-parallel-size 4"
    check(argv, 4)


def test_the_number_of_processes():
    (fault,) = faults("--tensor-model-parallel-size 2", 3)
    assert "start with torchrun --nproc_per_node 2 or 4" in fault
    (fault,) = faults("--tensor-model-parallel-size 2")
    assert "start with torchrun --nproc_per_node 2" in fault
    (fault,) = faults("--global-batch-size 6 --micro-batch-size 2", 4)
    assert "use --global-batch-size 8" in fault


def test_a_wrong_world_size_is_named():
    with pytest.raises(ConfigError, match="environment variable WORLD_SIZE = 'two'"):
        parse_pretrain(BASE.split(), {"WORLD_SIZE": "two"})


def test_batch_layout():
    config = check("--global-batch-size 24 --micro-batch-size 2 --tensor-model-parallel-size 2", 8)
    layout = batch_layout(config, 8)
    assert (layout.data_parallel_size, layout.num_microbatches) == (4, 3)
    assert batch_layout(check("--micro-batch-size 3"), 4).global_batch_size == 12


def test_a_dry_run_plans_for_one_copy_of_the_model():
    config = check("--tensor-model-parallel-size 8 --dry-run")
    assert world_size(config, {}) == 8
    assert world_size(config, {"WORLD_SIZE": "16"}) == 16


def test_data_paths(tmp_path):
    def found(argv: str) -> str:
        with pytest.raises(ConfigError) as caught:
            parse_pretrain(["--vocab-size", "9", *argv.split()], {})
        return str(caught.value)

    prefix = tmp_path / "corpus"
    assert "try --mock-data" in found("")
    assert "kvshare preprocess" in found(f"--data-path {prefix}")
    assert f"write --data-path {prefix}" in found(f"--data-path {prefix}.bin")
    assert "0.7 first_prefix 0.3" in found("--data-path 0.5 a b")
    assert "0.7 first_prefix 0.3" in found("--data-path 0 a 1 b")
    assert "excludes" in found("--data-path a --train-data-path b")
    assert "add --train-data-path PREFIX" in found("--valid-data-path b")
    for ending in (".bin", ".idx"):
        (tmp_path / f"corpus_text_document{ending}").write_bytes(b"")
    assert f"write --data-path {prefix}_text_document" in found(f"--data-path {prefix}")
    parse_pretrain(["--vocab-size", "9", "--data-path", f"{prefix}_text_document"], {})


def test_places_to_write(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "is a file, not a folder" in faults(f"--save {blocker}/run")[0]
    assert "this is a folder" in faults(f"--metrics-file {tmp_path}")[0]
    assert "is a file, not a folder" in faults(f"--metrics-file {blocker}/m.jsonl")[0]
    assert "is a file, not a folder" in faults(f"--tensorboard-dir {blocker}/tb")[0]
    check(f"--save {tmp_path}/new/run --metrics-file {tmp_path}/logs/m.jsonl")
    assert not (tmp_path / "new").exists()


def test_a_type_fault_does_not_hide_a_bad_map_or_rate():
    found = faults("--seed x --num-layers 4 --kv-map 0_9_2_3 --lr 1e-4 --min-lr 1 --num-worker 3")
    assert len(found) == 4
    text = "\n".join(found)
    for part in ("--seed", "--kv-map", "--min-lr", "--num-workers"):
        assert part in text


def test_warnings():
    def warned(argv: str) -> str:
        return "\n".join(warnings_of(argv))

    assert "--sequence-parallel has no effect" in warned("--sequence-parallel")
    assert "layer 0" in warned("--kv-pattern lasagna-top --kv-layers 11")
    assert "no layer of this map" in warned("--window-size 8")
    assert "--lr-wsd-decay-iters has no effect" in warned("--lr-wsd-decay-iters 8")
    assert "nothing will be saved" in warned("")
    assert warned("--save runs/x") == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--profile --use-pytorch-profiler --train-iters 5", "--profile-step-start"),
        ("--profile --profile-step-start 4 --profile-step-end 4", "--profile-step-end"),
        ("--use-pytorch-profiler", "--use-pytorch-profiler"),
    ],
)
def test_there_is_something_to_profile(flags: str, says: str) -> None:
    (fault,) = faults(flags)
    assert fault.startswith(says)


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("NCCL_ALGO", "Ring", True),
        ("NCCL_ALGO", "NVLS", False),
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8", True),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", False),
    ],
)
def test_deterministic_mode_and_the_environment(name, value, fits, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    check("")
    if fits:
        check("--deterministic-mode")
        return
    (fault,) = faults("--deterministic-mode")
    assert name in fault and f"unset {name}" in fault
