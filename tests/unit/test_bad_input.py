"""Whatever a user gets wrong: a non-zero exit and one message with the place and a fix.

All commands run in this process through the entry point; `pretrain` with --dry-run, so no process
group starts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kvshare.cli.main import main

SMALL = (
    "pretrain --dry-run --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 16"
    " --train-iters 2 --global-batch-size 2 --eval-iters 1"
)
MOCK = f"{SMALL} --mock-data --vocab-size 100"
REAL = f"{SMALL} --data-path {{dir}}/corpus_text_document --split 80,20,0"
PREPROCESS = "preprocess --output-prefix {dir}/out --tokenizer-type NullTokenizer --vocab-size 100"
TOKENIZER = "train-tokenizer --output {dir}/tok"

# command line, what the message must name, what the fix must say
COMMANDS = [
    ("", "usage", "kvshare COMMAND --help"),
    ("pretran", "pretran", "use `kvshare pretrain`"),
    ("pretrain", "--data-path", "--mock-data"),
]
MAPS = [
    ("plan --kv-pattern sandwich-topp", "--kv-pattern", "did you mean sandwich-top"),
    ("plan --kv-pattern sandwich-top", "--kv-layers", "from 1 to 22"),
    ("plan --kv-pattern pizza-top --kv-layers 30", "--kv-layers", "from 1 to 22"),
    ("plan --kv-pattern cla", "--kv-pattern", "cla:2"),
    ("plan --kv-pattern cla:0", "--kv-pattern", "from 1 to 22"),
    ("plan --kv-pattern gemma:22", "--kv-pattern", "from 0 to 21"),
    ("plan --kv-pattern yoco:3", "--kv-pattern", "use --kv-pattern yoco"),
    ("plan --kv-map 0_1_9", "layer 2", "own KV"),
    ("plan --kv-map 0_0_1", "layer 2", "own KV"),
    ("plan --kv-map 0_1_a", "layer 2", "0_1s_1s_3"),
    ("plan --kv-map 0_1_2 --num-layers 4", "--kv-map", "--num-layers 3"),
    ("plan --kv-pattern mixattention --num-layers 8", "--num-layers", "--num-layers 22"),
    ("plan --kv-layer 3", "--kv-layer", "did you mean --kv-layers"),
    ("plan --num-layers none", "--num-layers", "--num-layers 22"),
    (f"{MOCK} --kv-map 0_1_1", "--kv-map", "--num-layers 3"),
    (f"{MOCK} --kv-map 0_1s_1s_3", "--window-size", "--window-size W"),
    (f"{MOCK} --kv-backward-sweeps 0", "--kv-backward-sweeps", "--kv-backward-sweeps 1"),
    (f"{MOCK} --kv-forward-sweeps -1", "--kv-forward-sweeps", "--kv-forward-sweeps 1"),
    (f"{MOCK} --kv-recipe paper --kv-stride 4", "--kv-stride", "--kv-solver strided"),
    (f"{MOCK} --kv-solver strided --kv-stride 1", "--kv-stride", "--kv-stride 4"),
    (f"{MOCK} --kv-recipe quick", "--kv-recipe", "--kv-recipe one-sweep"),
    (f"{MOCK} --kv-start here", "--kv-start", "--kv-start zero"),
    (
        f"{MOCK} --kv-forward-sweeps 0 --kv-project-at-use",
        "--kv-project-at-use",
        "--kv-forward-sweeps 1",
    ),
    (f"{MOCK} --kv-tolerance 0", "--kv-tolerance", "--kv-tolerance"),
    (f"{MOCK} --kv-min-sweeps 20", "--kv-min-sweeps", "--kv-min-sweeps 16"),
    (f"{MOCK} --kv-tolerance-in-training", "--kv-tolerance", "--kv-tolerance 0.01"),
    (
        f"{MOCK} --kv-pattern pizza-top --kv-layers 2 --hidden-dropout 0.1",
        "every sweep would see another mask",
        "--hidden-dropout 0",
    ),
]
SIZES = [
    (f"{MOCK} --hidden-size 66", "--hidden-size", "64 or 68"),
    (f"{MOCK} --num-query-groups 3", "--num-query-groups", "--num-query-groups 2"),
    (f"{MOCK} --kv-channels 5", "--kv-channels", "4 or 6"),
    (f"{MOCK} --tensor-model-parallel-size 3", "--num-attention-heads 4", "size 2"),
    (f"{MOCK} --pipeline-model-parallel-size 3", "do not divide", "layout 2,1,1"),
    (f"{MOCK} --micro-batch-size 3", "--global-batch-size", "--global-batch-size 3"),
    (f"{MOCK} --lr-warmup-iters 9", "--lr-warmup-iters", "--lr-warmup-iters 0"),
    (f"{MOCK} --min-lr 1", "--min-lr", "--min-lr 4e-05"),
    (f"{MOCK} --lr 0", "--lr", "--lr 0.0004"),
    (f"{MOCK} --lr-decay-style WSD", "--lr-wsd-decay-iters", "--lr-wsd-decay-iters 1"),
    (f"{MOCK} --train-iters 1e3", "--train-iters", "--train-iters 1000"),
    (f"{MOCK} --max-position-embeddings 8", "--max-position-embeddings", "16"),
]
FLAGS = [
    (f"{MOCK} --fp16", "--fp16", "use --bf16"),
    (f"{MOCK} --num-experts 8", "--num-experts", "leave it out"),
    (f"{MOCK} --normalization LayerNorm", "--normalization", "RMSNorm"),
    (f"{MOCK} --rampup-batch-size 2 2 100", "--rampup-batch-size", "--global-batch-size"),
    (f"{MOCK} --train-samples 100", "--train-samples", "--train-iters"),
    (f"{MOCK} --async-save", "--async-save", "add --save FOLDER"),
    (f"{MOCK} --keep-last 0 --save {{dir}}/a", "--keep-last", "--keep-last 1"),
    (f"{MOCK} --keep-every 5 --save {{dir}}/a", "--keep-every", "add --keep-last N"),
    (f"{MOCK} --num-layer 3", "--num-layer", "did you mean --num-layers"),
    (f"{MOCK} --bf16 yes", "--bf16", "write --bf16 alone"),
    (f"{MOCK} --seed", "--seed", "--seed 1234"),
    (f"{MOCK} --config {{dir}}/none.yaml", "--config", "path of a YAML file"),
    (f"{MOCK} --config {{dir}}/bad.yaml", "bad.yaml:2: num_layer", "did you mean num_layers"),
]
FILES = [
    (f"{MOCK} --save {{dir}}/file/run", "--save", "a folder you can write to"),
    (f"{MOCK} --metrics-file {{dir}}", "--metrics-file", "metrics.jsonl"),
    (f"{MOCK} --load {{dir}}/nowhere", "--load", "drop --load"),
    (f"{MOCK} --save-interval 2", "--save-interval", "add --save FOLDER"),
]
DATA = [
    (f"{SMALL} --data-path {{dir}}/nothing", "nothing.bin", "kvshare preprocess"),
    (f"{SMALL} --data-path {{dir}}/corpus", "corpus", "corpus_text_document"),
    (f"{SMALL} --data-path {{dir}}/corpus_text_document.bin", ".bin", "corpus_text_document"),
    (f"{SMALL} --data-path {{dir}}/empty", "empty", "kvshare preprocess"),
    (f"{SMALL} --data-path {{dir}}/foreign", "foreign.idx", "kvshare preprocess"),
    (f"{SMALL} --data-path 0.5 {{dir}}/corpus_text_document 0.5", "--data-path", "0.7 first"),
    (f"{REAL} --split 100,0,0", "--split", "use --split"),
    (f"{REAL} --split 1,2,3,4", "--split", "969,30,1"),
    (f"{REAL} --vocab-size 50", "--vocab-size", "--vocab-size 100"),
    (f"{REAL} --reset-attention-mask", "--reset-attention-mask", "--append-eod"),
    (f"{REAL} --tokenizer-model {{dir}}/file", "--tokenizer-model", ".model file"),
    (f"{REAL} --tokenizer-model {{dir}}/none.model", "--tokenizer-model", "train-tokenizer"),
    (f"{REAL} --tokenizer-type HuggingFaceTokenizer", "--tokenizer-model", "FOLDER"),
    (f"{REAL} --tokenizer-type GPT2BPETokenizer", "--tokenizer-type", "SentencePieceTokenizer"),
    (PREPROCESS, "--input", "--input TEXT"),
    (f"{PREPROCESS} --input {{dir}}/none.txt", "none.txt", "Fix:"),
    (f"{PREPROCESS} --input {{dir}}/empty.txt", "empty.txt", "Fix:"),
    (f"{PREPROCESS} --input {{dir}}/words.txt", "not a list of numbers", "Fix:"),
    (f"{PREPROCESS} --input {{dir}}/broken.jsonl", "broken.jsonl", "Fix:"),
    (f"{PREPROCESS} --input {{dir}}/numbers.txt --workers 0", "--workers", "--workers 1"),
    (f"{TOKENIZER} --input {{dir}}/words.txt", "--vocab-size", "--vocab-size N"),
    (f"{TOKENIZER} --input {{dir}}/words.txt --vocab-size 9000", "--vocab-size", "Fix:"),
    (f"{TOKENIZER} --input {{dir}}/none.txt --vocab-size 300", "none.txt", "Fix:"),
]
CASES = [*COMMANDS, *MAPS, *SIZES, *FLAGS, *FILES, *DATA]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sound and broken files that the commands are pointed at."""
    path = tmp_path_factory.mktemp("bad_input")
    for name, text in {
        "file": "not a folder, not a tokenizer",
        "bad.yaml": "seed: 1\nnum_layer: 4\n",
        "numbers.txt": "\n".join(" ".join(map(str, range(line, line + 60))) for line in range(20)),
        "words.txt": "no numbers here\n",
        "empty.txt": "",
        "broken.jsonl": '{"text": "1 2"}\n{"text": \n',
        "empty.bin": "",
        "empty.idx": "",
        "foreign.bin": "x" * 100,
        "foreign.idx": "y" * 100,
    }.items():
        (path / name).write_text(text)
    arguments = "preprocess --tokenizer-type NullTokenizer --vocab-size 100 --text-documents line"
    places = ["--input", str(path / "numbers.txt"), "--output-prefix", str(path / "corpus")]
    assert main([*arguments.split(), *places]) == 0
    return path


@pytest.fixture
def complaint(folder, monkeypatch, capsys):
    """Run a command line that must fail and return what it printed to stderr."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(line: str) -> str:
        capsys.readouterr()
        assert main(line.format(dir=folder).split()) != 0
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(("line", "place", "fix"), CASES, ids=[case[0] or "-" for case in CASES])
def test_bad_input(complaint, line, place, fix):
    message = complaint(line)
    assert "Traceback" not in message
    assert place in message
    assert fix in message


def test_the_table_is_long_enough():
    assert len(CASES) >= 40


def test_faults_of_every_kind_come_in_one_message(complaint):
    message = complaint(
        f"{MOCK} --num-layer 3 --seed x --fp16 --kv-map 0_9_2_3 --min-lr 1 --save {{dir}}/file/run"
    )
    assert "6 faults" in message
    for flag in ("--num-layer", "--seed", "--fp16", "--kv-map", "--min-lr", "--save"):
        assert flag in message


def test_the_same_command_lines_without_the_mistake_are_fine(folder, capsys):
    assert main(MOCK.split()) == 0
    assert main(REAL.format(dir=folder).split()) == 0
    assert "num_layers" in capsys.readouterr().out
