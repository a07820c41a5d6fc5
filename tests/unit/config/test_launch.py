"""Processes know how many they are, whoever has started them, or say that they do not."""

from __future__ import annotations

import pytest

from megatron_kvshare.config.launch import Launch, launched, speaks, told_once
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import EXIT_USER_ERROR, ConfigError

MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
ALONE = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
TORCHRUN = {**MEET, "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
PAIR = {**MEET, "RANK": "0", "WORLD_SIZE": "2"}
NODES = {**TORCHRUN, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2"}
DEEPSPEED = {
    **MEET,
    **{"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"},
    **{"CROSS_RANK": "1", "CROSS_SIZE": "2"},
}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "0"}, Launch(0, 1, 0)),
        ({"WORLD_SIZE": "1"}, Launch(0, 1, 0)),
        (BATCH, Launch(0, 1, 0)),
        (STEP | {"SLURM_STEP_ID": "4294967290"}, Launch(0, 1, 0)),  # a shell of salloc
        (STEP | {"SLURM_STEP_ID": "4294967291"}, Launch(0, 1, 0)),  # a batch script
        (ALONE, Launch(0, 1, 0)),
        (TORCHRUN, Launch(5, 16, 5)),
        (NODES, Launch(5, 16, 5)),
        (ALONE | NODES, Launch(5, 16, 5)),
        (DEEPSPEED, Launch(9, 16, 1)),
        (STEP | DEEPSPEED, Launch(9, 16, 1)),
        (STEP | NODES, Launch(5, 16, 5)),
        (STEP | MEET | {"RANK": "1", "WORLD_SIZE": "2"}, Launch(1, 2, 0)),
        (TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "5"}, Launch(5, 16, 5)),
        # mpirun starts its own helpers by srun: one per node, each of them with eight ranks
        (STEP | TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "16"}, Launch(5, 16, 5)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, Launch(0, 1, 0)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0", "PMIX_RANK": "0", "MPI_LOCALNRANKS": "1"}, Launch()),
    ],
)
def test_who_is_known(environ: dict[str, str], place: Launch) -> None:
    assert launched(environ) == place


@pytest.mark.parametrize(
    ("environ", "named", "fix"),
    [
        (STEP, "SLURM_STEP_NUM_TASKS = '2'", "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS"),
        (STEP | {"WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS = '2'", "MASTER_ADDR"),
        (
            STEP | MEET | {"SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "2"},
            "'4'",
            "srun",
        ),
        (STEP | NODES | {"GROUP_WORLD_SIZE": "1"}, "2 times torchrun, for 1 nodes", "--nnodes"),
        (STEP | DEEPSPEED | {"CROSS_SIZE": "1"}, "2 times deepspeed, for 1 nodes", "--hostfile"),
        (BATCH | {"SLURM_STEP_ID": "3", "SLURM_PROCID": "1"}, "SLURM_PROCID = '1'", "env -u SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE = '2'", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK = '1'", "mpirun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE = '2'", "WORLD_SIZE=$PMI_SIZE"),
        ({"PMI_RANK": "3"}, "at least 4 processes", "torchrun per node"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK = '1'", "env -u PMIX_RANK"),
        ({"MPI_LOCALNRANKS": "8"}, "MPI_LOCALNRANKS = '8'", "torchrun"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE = '2'", "MV2_COMM_WORLD_RANK"),
        ({"JSM_NAMESPACE_SIZE": "6"}, "JSM_NAMESPACE_SIZE = '6'", "jsrun"),
        ({"RANK": "1"}, "RANK = 1", "unset RANK"),
        (MEET | {"WORLD_SIZE": "2"}, "WORLD_SIZE = 2", "torchrun"),
        (MEET | {"RANK": "2", "WORLD_SIZE": "2"}, "ranks are 0 to 1", "torchrun"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "ranks are 0 to 0", "torchrun"),
        ({"RANK": "one"}, "RANK = 'one'", "unset RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK = '-1'", "unset RANK"),
        ({"RANK": ""}, "RANK = ''", "unset RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'", "unset WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "at least 1", "unset WORLD_SIZE"),
        ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK = '0.5'", "torchrun"),
        (TORCHRUN | {"LOCAL_RANK": "8"}, "local ranks are 0 to 7", "torchrun"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS = 'many'", "unset"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT = None", "torchrun"),
        (MEET | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT", "port"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR = None", "torchrun"),
    ],
)
def test_who_is_not_known_is_refused(environ: dict[str, str], named: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refused:
        launched(environ)
    assert len(refused.value.faults) == 1
    assert "environment variable" in str(refused.value)
    assert named in str(refused.value) and fix in str(refused.value)


def test_a_run_tells_it_with_all_other_faults() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_pretrain(["--mock-data", "--lr", "-1"], STEP, starts=True)
    wrong = [fault.where for fault in refused.value.faults]
    assert wrong == ["--lr", "--vocab-size", "environment variable SLURM_STEP_NUM_TASKS"]


def test_a_dry_run_plans_for_any_number_of_processes() -> None:
    flags = ["--mock-data", "--vocab-size", "100", "--dry-run"]
    for environ in (STEP, {"WORLD_SIZE": "8"}):
        assert parse_pretrain(flags, environ, starts=True).dry_run
    with pytest.raises(ConfigError, match="RANK = 'x'"):
        parse_pretrain(flags, {"RANK": "x"}, starts=True)


def test_one_of_all_processes_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speaks(STEP) and not speaks(STEP | {"SLURM_PROCID": "1"})
    assert speaks(BATCH | {"SLURM_PROCID": "1"}), "no step: nothing has started it"
    assert not speaks({"OMPI_COMM_WORLD_RANK": "1"})
    assert not speaks(TORCHRUN | {"OMPI_COMM_WORLD_RANK": "0"})
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError), told_once():
        launched()
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit) as left, told_once():
        launched()
    assert left.value.code == EXIT_USER_ERROR
