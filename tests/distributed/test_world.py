"""The world of workers itself: what a job returns, and how failures end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.world import PATIENCE_SECONDS, Layout, WorkerError, World, free_port

ROOT = Path(__file__).parents[2]


def describe(state, layout, word: str) -> tuple:
    return word, state.rank, state.tp_rank, state.tp_size, state.dp_rank, state.dp_size


def misbehave(state, layout, how: str) -> None:
    if how == "raise":
        raise ValueError("a remote fault")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2 * PATIENCE_SECONDS)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(2), Layout(1, 2), Layout(2, 2), Layout(4)], ids=str
)
def test_results_come_in_the_order_of_ranks(layout: Layout, world: World):
    expected = [
        ("hello", rank, rank % layout.tensor, layout.tensor, rank // layout.tensor, layout.data)
        for rank in range(layout.world_size)
    ]
    assert world.run(describe, layout, "hello") == expected


@pytest.fixture
def small_world() -> Iterator[World]:
    started = World(size=1)
    yield started
    started.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "(?s)rank 0 failed.*in misbehave.*a remote fault"),
        pytest.param("die", "worker of rank 0 died", marks=pytest.mark.nightly),
        pytest.param("hang", r"no answer from ranks \[0\] in time", marks=pytest.mark.nightly),
    ],
)
def test_a_failed_job_ends_the_workers(how, message, small_world):
    small_world.run(describe, Layout(), "ready")
    before = workers_of(os.getpid())
    patience = {"timeout_seconds": 3} if how == "hang" else {}
    with pytest.raises(WorkerError, match=message):
        small_world.run(misbehave, Layout(), how, **patience)
    assert before - workers_of(os.getpid()), "the worker is still there"


@pytest.mark.nightly
def test_the_job_after_a_failure_gets_new_workers(small_world):
    with pytest.raises(WorkerError):
        small_world.run(misbehave, Layout(), "die")
    assert small_world.run(describe, Layout(), "again")[0][0] == "again"


def workers_of(parent: int) -> set[int]:
    """Process ids of the spawned children of a process."""
    ids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return {each for each in ids if parent_of(each) == parent}


def parent_of(process: int) -> int | None:
    """None for one that has ended, whether or not somebody has asked for its exit code."""
    try:
        state, parent, *_ = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(parent)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_workers_do_not_outlive_a_killed_parent():
    program = (
        "from tests.distributed.world import World\n"
        "if __name__ == '__main__':\n"
        "    world = World(size=2)\n"
        "    world._start()\n"
        "    print('started', flush=True)\n"
        "    input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    workers = workers_of(parent.pid)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(parent_of(worker) is not None for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.2)


def test_ports_are_of_this_process_alone_and_none_is_given_twice_in_a_row():
    mine = [free_port() for _ in range(50)]
    code = "from tests.distributed.world import free_port; print([free_port() for _ in range(50)])"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len({*mine, *json.loads(other.stdout)}) == 100
    with socket.socket() as taken:
        taken.bind(("", free_port()))
        ports = {free_port() for _ in range(200)}
        assert taken.getsockname()[1] not in ports and len(ports) > 50
