"""Every script parses and plans the run it promises; without a GPU it trains its map family."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_kvshare.cli.bench_flags import RULES, BenchConfig, maps, with_sizes
from megatron_kvshare.cli.main import main
from megatron_kvshare.config.flags.command_line import Command, parse
from tests.integration.conftest import ROOT, Workspace

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("pretrain_*.sh"))
SCRIPTS = sorted(
    path
    for pattern in ("examples/*.sh", "tools/*.sh", "tests/**/*.sh", "slurm/*.sbatch", ".ci/run")
    for path in ROOT.glob(pattern)
)
# What a map must look like at the 8 layers of the small model, and at full size.
SMALL_MAPS = {
    "pretrain_1b_top_share.sh": "0_1_6_6_6_6_6_7",
    "pretrain_1b_middle_share.sh": "0_1_4_4_4_4_4_7",
    "pretrain_1b_bottom_share.sh": "0_1_2_3_3_3_3_3",
    "pretrain_1b_cla.sh": "0_0_2_2_4_4_6_6",
    "pretrain_1b_yoco.sh": "0s_1s_2s_3s_4_4_4_4",
    "pretrain_1b_standard.sh": "0_1_2_3_4_5_6_7",
    "pretrain_110m.sh": "0_1_6_6_6_6_6_7",
}
FULL_SIZE_LINES = {
    "pretrain_1b_top_share.sh": "0_1_2_3_4_16_16_16_16_16_16_16_16_16_16_16_16_17_18_19_20_21",
    "pretrain_1b_yoco.sh": "10s_11_11_11_11_11_11_11_11_11_11_11",
    "pretrain_110m.sh": "0_1_2_9_9_9_9_9_9_9_10_11",
}


# Stands for Python on a machine without GPUs: shows what it is asked to start.
SHOWING_PYTHON = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'


@pytest.fixture
def showing_python(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(SHOWING_PYTHON)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def dry_run(workspace: Workspace, showing_python: str, monkeypatch, capsys):
    """What the command that an example starts would train; in this process, which has torch."""
    assert workspace.bash("bash examples/prepare_corpus.sh").returncode == 0

    def run(name: str, **environment: str) -> str:
        started = workspace.bash(f"bash examples/{name}", {**environment, "PYTHON": showing_python})
        assert started.returncode == 0, started.stderr
        module, package, *arguments = started.stdout.splitlines()
        assert (module, package, arguments[0]) == ("-m", "megatron_kvshare", "pretrain")
        monkeypatch.chdir(workspace.folder)
        assert main([*arguments, "--dry-run"]) == 0
        report = capsys.readouterr().out
        assert "Dry run" in report
        return report + started.stderr

    return run


def map_of(report: str) -> str:
    found = re.search(r"^ *map (\S+)$", report, re.M)
    assert found, report
    return found.group(1)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_parse_and_can_be_started(path: Path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.suffix == ".sbatch" or path.stat().st_mode & 0o100, "not executable"


def test_every_example_is_listed_here():
    assert set(EXAMPLES) == set(SMALL_MAPS)


@pytest.mark.parametrize("name", sorted({*EXAMPLES} - {"pretrain_1b_top_share.sh"}))
def test_without_a_gpu_an_example_plans_its_family(name: str, dry_run):
    report = dry_run(name)
    assert "no GPU here" in report
    assert map_of(report) == SMALL_MAPS[name]


@pytest.mark.parametrize("name", FULL_SIZE_LINES)
def test_the_full_size_plan(name: str, dry_run):
    report = dry_run(name, FULL_SIZE="1")
    assert map_of(report).endswith(FULL_SIZE_LINES[name])


def test_aggressive_sharing(dry_run):
    report = dry_run("pretrain_1b_top_share.sh", KV_LAYERS="3")
    assert map_of(report) == "0_6_6_6_6_6_6_7"


def test_an_example_trains_and_arguments_win(workspace: Workspace):
    code = "bash examples/pretrain_1b_top_share.sh --log-interval 1 --eval-iters 1 --train-iters 3"
    more = {"SAVE": "runs/short/checkpoint", "TRAIN_ITERS": "7"}
    done = workspace.bash(f"{code} --micro-batch-size 1 --global-batch-size 2", more)
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stderr and "unigram entropy" in done.stderr
    assert map_of(done.stdout) == SMALL_MAPS["pretrain_1b_top_share.sh"]
    assert "validation perplexity" in done.stdout
    lines = (workspace.folder / "runs/short/metrics.jsonl").read_text().splitlines()
    assert [step["step"] for step in map(json.loads, lines) if "loss" in step] == [1, 2, 3]
    assert (workspace.folder / "runs/short/checkpoint").is_dir()


def test_several_nodes_need_data(workspace: Workspace):
    done = workspace.bash("bash examples/pretrain_1b_cla.sh", {"NNODES": "2"})
    assert done.returncode == 2
    assert "DATA_PATH" in done.stderr and "Traceback" not in done.stderr


def test_the_launcher_alone_says_what_to_start(workspace: Workspace):
    done = workspace.bash("bash examples/launch.sh")
    assert done.returncode != 0
    assert "pretrain_1b_top_share.sh" in done.stderr


# Stands for Python on a machine with eight GPUs: counts them, and shows what it is asked to start.
GPU_PYTHON = '#!/usr/bin/env bash\nif [[ "$1" == -c ]]; then echo 8; else echo "$*"; fi\n'


@pytest.fixture
def gpu_machine(tmp_path: Path) -> dict[str, str]:
    for name, code in (("python", GPU_PYTHON), ("nvidia-smi", "#!/bin/sh\n")):
        (tmp_path / name).write_text(code)
        (tmp_path / name).chmod(0o755)
    data = {"DATA_PATH": "0.7 a 0.3 b", "TOKENIZER_MODEL": "tok.model", "SAVE": "out/checkpoint"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {**data, "PATH": path, "PYTHON": str(tmp_path / "python")}


def test_with_gpus_the_full_model_starts_on_all_of_them(workspace, gpu_machine):
    done = workspace.bash("bash examples/pretrain_1b_top_share.sh --lr 1e-4", gpu_machine)
    wanted = (
        "tools/torchrun.py --nproc_per_node 8 --standalone -m megatron_kvshare pretrain"
        " --config examples/configs/1b.yaml --kv-pattern sandwich-top --kv-layers 11"
        " --kv-recipe two-sweep --data-path 0.7 a 0.3 b --save out/checkpoint --resume auto"
        " --metrics-file out/metrics.jsonl --tokenizer-type SentencePieceTokenizer"
        " --tokenizer-model tok.model --lr 1e-4"
    )
    assert done.stdout.strip() == wanted


@pytest.mark.nightly
def test_the_serving_benchmark_runs_at_a_tiny_size(
    workspace: Workspace, showing_python: str, monkeypatch, capsys
):
    """In this process; arguments win."""
    code = "bash examples/bench_1b.sh --lengths 5+11 --kv-layers 3 --json"
    started = workspace.bash(code, {"OUTPUT": "runs/bench", "PYTHON": showing_python})
    assert started.returncode == 0 and "no GPU here" in started.stderr
    module, package, *arguments = started.stdout.splitlines()
    assert (module, package) == ("-m", "megatron_kvshare")
    monkeypatch.chdir(workspace.folder)
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = ["standard", "pizza-bottom 3", "sandwich-top 3"]
    assert [row["map"] for row in rows] == names
    assert {(row["prompt"], row["generated"]) for row in rows} == {(5, 11)}
    assert json.loads((workspace.folder / "runs/bench/bench.json").read_text())["rows"] == rows


def test_the_serving_benchmark_at_full_size(workspace: Workspace, gpu_machine):
    done = workspace.bash("bash examples/bench_1b.sh --cache-gb 3.6", gpu_machine)
    module, package, command, *arguments = done.stdout.split()
    assert (module, package, command) == ("-m", "megatron_kvshare", "bench")
    config = parse(BenchConfig, with_sizes(arguments), Command("kvshare bench", rules=RULES))
    assert config.model.num_layers == 22 and config.model.bf16 and config.budget == 180
    assert config.pairs == ((5, 2043), (512, 1024), (2048, 2048))
    counts = [len(each.map.producers) for each in maps(config, 22)]
    assert counts == [11, 3, 11, 3] and config.cache_gb == 3.6


DEEPSPEED = "deepspeed/pretrain_1b_top_share_deepspeed.sh"
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")


@pytest.mark.parametrize("zero", ZERO)
def test_every_file_for_deepspeed_fits_its_example(zero: str, dry_run, monkeypatch):
    """At both sizes, the full one on eight processes: the stage that its name says."""
    for size, last in (({}, "6_6_7"), ({"FULL_SIZE": "1"}, "19_20_21")):
        if size:
            monkeypatch.setenv("WORLD_SIZE", "8")
        report = dry_run(DEEPSPEED, ZERO=zero, **size)
        assert f"deepspeed, ZeRO {zero[4]} *" in report
        assert re.search(rf"zero_stage +{zero[4]} ", report)
        assert ("cpu  " in report) == zero.endswith("offload")
        assert map_of(report).endswith(last)


def test_the_full_size_for_deepspeed_is_that_of_megatron():
    ours = yaml.safe_load((ROOT / "examples/deepspeed/1b.yaml").read_text())
    theirs = yaml.safe_load((ROOT / "examples/configs/1b.yaml").read_text())
    data_parallel = {"use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather"}
    assert ours == {name: value for name, value in theirs.items() if name not in data_parallel}


def test_a_file_for_deepspeed_that_is_not_there_is_told(workspace: Workspace):
    done = workspace.bash(f"bash examples/{DEEPSPEED}", {"ZERO": "zero4"})
    assert done.returncode == 2 and "zero4.json: ZERO names one" in done.stderr


def losses(workspace: Workspace, run: str) -> list[float]:
    lines = (workspace.folder / f"runs/{run}/metrics.jsonl").read_text().splitlines()
    return [step["loss"] for step in map(json.loads, lines) if "loss" in step]


def test_deepspeeds_launcher_trains_the_example(workspace: Workspace, tmp_path: Path):
    """On two processes, by a file that makes DeepSpeed itself tell its steps."""
    telling = json.loads((ROOT / "examples/deepspeed/zero1.json").read_text())
    (tmp_path / "ds.json").write_text(
        json.dumps({**telling, "steps_per_print": 1, "log_level": "info"})
    )
    code = f"bash examples/{DEEPSPEED} --log-interval 1 --eval-iters 0 --train-iters 3"
    code += f" --micro-batch-size 1 --global-batch-size 2 --deepspeed-config {tmp_path}/ds.json"
    more = {"SAVE": "runs/launched/checkpoint", "LAUNCHER": "deepspeed", "NPROC": "2"}
    done = workspace.bash(code, more)
    assert done.returncode == 0, done.stderr
    assert len(losses(workspace, "launched")) == 3
    assert "2 processes" in done.stdout and "--num_gpus 2 --module" in done.stdout
    assert "step=3, skipped=0" in done.stdout + done.stderr


@pytest.mark.nightly
def test_the_example_for_deepspeed_learns(workspace: Workspace):
    """As it stands, but shorter."""
    done = workspace.bash(f"bash examples/{DEEPSPEED} --train-iters 60 --log-interval 20")
    assert done.returncode == 0, done.stderr
    first, *_, last = losses(workspace, "deepspeed-zero1")
    assert last < first - 0.1


def test_deepspeeds_launcher_gets_the_command(workspace: Workspace, gpu_machine):
    """On one machine, and as one of two that SLURM starts."""
    done = workspace.bash(f"bash examples/{DEEPSPEED}", {**gpu_machine, "LAUNCHER": "deepspeed"})
    launcher = "-m deepspeed.launcher.runner --num_gpus 8"
    command = "--module megatron_kvshare pretrain --config examples/deepspeed/1b.yaml"
    assert done.stdout.startswith(f"{launcher} {command} --kv-pattern sandwich-top")
    told = "--deepspeed --deepspeed-config examples/deepspeed/zero1.json"
    assert done.stdout.rstrip().endswith(told)
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "HOSTFILE": "hosts"}
    more = {**gpu_machine, **nodes, "LAUNCHER": "deepspeed"}
    done = workspace.bash(f"bash examples/{DEEPSPEED}", more)
    where = "--hostfile hosts --no_ssh --node_rank 1 --master_addr first --master_port 29500"
    assert done.stdout.startswith(f"{launcher} {where} {command}"), done.stderr


RECIPES = {
    "top_share": ("--kv-layers 11 --kv-recipe two-sweep --data-path", {}, ""),
    "middle_share": ("--kv-layers 11 --kv-recipe paper --data-path", {"KV_RECIPE": "paper"}, ""),
    "bottom_share": ("--kv-layers 11 --data-path", {}, ""),
    "yoco": ("--window-size 1024 --data-path", {}, ""),
    "top_share, published": ("--kv-layers 11 --data-path", {}, "--kv-solver jacobi"),
}
"""Of some examples: what the flags of the map are, and between which others."""


@pytest.mark.parametrize("case", RECIPES)
def test_an_example_of_a_cyclic_map_names_its_recipe(workspace, gpu_machine, case: str):
    flags, more, arguments = RECIPES[case]
    script = f"examples/pretrain_1b_{case.partition(',')[0]}.sh"
    done = workspace.bash(f"bash {script} {arguments}", {**gpu_machine, **more})
    assert flags in done.stdout, done.stderr


def test_an_example_leaves_the_recipe_to_its_checkpoint(workspace, gpu_machine, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    more = {**gpu_machine, "SAVE": str(tmp_path)}
    done = workspace.bash("bash examples/pretrain_1b_top_share.sh", more)
    assert "--kv-layers 11 --data-path" in done.stdout, done.stderr
    more["KV_RECIPE"] = "one-sweep"
    done = workspace.bash("bash examples/pretrain_1b_top_share.sh", more)
    assert "--kv-layers 11 --kv-recipe one-sweep --data-path" in done.stdout, done.stderr


def test_several_nodes_and_tensor_parallel(workspace, gpu_machine):
    more = {
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "first",
        "TP": "2",
        "GPUS_PER_NODE": "4",
    }
    done = workspace.bash("bash examples/pretrain_1b_yoco.sh", {**gpu_machine, **more})
    torchrun = "--nproc_per_node 4 --nnodes 2 --node_rank 1 --master_addr first --master_port 29500"
    assert torchrun in done.stdout
    assert "--tensor-model-parallel-size 2 --sequence-parallel" in done.stdout
    assert "--kv-pattern yoco --window-size 1024" in done.stdout


def test_several_nodes_need_an_address(workspace, gpu_machine):
    done = workspace.bash("bash examples/pretrain_1b_cla.sh", {**gpu_machine, "NNODES": "2"})
    assert done.returncode != 0 and "MASTER_ADDR" in done.stderr


def test_srun_starts_every_process_by_itself(workspace, gpu_machine):
    """The processes know their ranks from SLURM; with one visible GPU each, its number is 0."""
    show = 'echo "$RANK of $WORLD_SIZE, GPU $LOCAL_RANK: $*"'
    Path(gpu_machine["PYTHON"]).write_text(GPU_PYTHON.replace('echo "$*"', show))
    task = {"LAUNCHER": "srun", "SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3"}
    started = {**gpu_machine, **task, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    done = workspace.bash("bash examples/pretrain_1b_yoco.sh", started)
    assert done.stdout.startswith("11 of 16, GPU 3: -m megatron_kvshare pretrain"), done.stderr
    alone = {**started, "CUDA_VISIBLE_DEVICES": "3", "CHECK": "1", "SAVE_BYTES": "5"}
    done = workspace.bash("bash examples/pretrain_1b_yoco.sh", alone)
    doctor = "-m megatron_kvshare doctor --distributed --save out/checkpoint --save-bytes 5"
    assert done.stdout == f"11 of 16, GPU 0: {doctor}\n"


def test_an_unknown_launcher_is_told(workspace, gpu_machine):
    done = workspace.bash("bash examples/pretrain_1b_cla.sh", {**gpu_machine, "LAUNCHER": "mpirun"})
    assert done.returncode == 2 and "torchrun or srun" in done.stderr


@pytest.mark.parametrize("code", [0, 2, 75])
def test_torchrun_passes_exit_codes_on(workspace: Workspace, code: int):
    (workspace.folder / "leave.py").write_text(f"import sys; sys.exit({code})")
    started = "tools/torchrun.py --standalone --nproc_per_node 1 leave.py"
    done = workspace.bash(f'PYTHONPATH=. "$PYTHON" {started}')
    assert done.returncode == code
    assert "Traceback" not in done.stderr
