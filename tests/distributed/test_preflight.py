"""`kvshare doctor --distributed` on two ranks: ready, not ready, and with one that stays away."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path

import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.megatron_api.parallel import ParallelState
from tests.distributed.world import Layout, World, free_port

TWO = Layout(data=2)
LONGEST_SECONDS = 60
"""A third of what the command waits for by itself."""


def doctor(
    state: ParallelState, layout: Layout, port: int, flags: list[str], absent: int | None
) -> tuple[int, str] | None:
    """Exit code and output of one rank, started anew; nothing on the rank that is absent."""
    parallel.destroy()
    if state.rank == absent:
        return None
    os.environ["MASTER_PORT"] = str(port)
    started = time.monotonic()  # not before: the workers may have to be started
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(["doctor", "--distributed", *flags])
        except SystemExit as left:
            code = left.code
    assert time.monotonic() - started < LONGEST_SECONDS
    return code, output.getvalue()


def checked(world: World, *flags: object, absent: int | None = None) -> list:
    try:
        return world.run(doctor, TWO, free_port(), [*map(str, flags)], absent)
    finally:
        world.forget_groups()


def test_a_job_that_is_ready(world: World, tmp_path: Path) -> None:
    first, second = checked(world, "--save", tmp_path / "run" / "checkpoint")
    assert second == (0, "")
    code, table = first
    assert code == 0
    for words in ("2 ranks are ready to train", "(ranks 0-1)", "gloo, all-reduce of", "B/s"):
        assert words in table
    assert f"free in {tmp_path}" in table
    assert not [*tmp_path.iterdir()]


def test_what_is_wrong_is_told_once_and_ends_all(world: World, tmp_path: Path) -> None:
    first, second = checked(world, "--save", tmp_path, "--save-bytes", 10**18)
    assert second == (2, "")
    code, message = first
    assert code == 2 and message.startswith("configuration error: --save")


@pytest.mark.parametrize("absent", [0, 1])
def test_a_missing_rank_is_told_not_waited_for(world: World, absent: int) -> None:
    answers = checked(world, "--timeout-seconds", 3, absent=absent)
    code, message = answers[1 - absent]
    assert code == 69
    assert ("ranks = '1'" if absent else "the first rank did not answer rank 1") in message
