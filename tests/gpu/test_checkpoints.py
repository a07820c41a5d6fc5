"""A checkpoint made on a GPU goes on on a CPU and back; a save beside the training is a snapshot.

The other place is always a worker on the CPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_kvshare.checkpoint.save import Saver
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.parameters import gather_by_name
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.saving import save, settle
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.step import train_step
from tests.distributed.jobs import stages
from tests.distributed.world import Layout, World
from tests.integration.pretrain_jobs import config_of
from tests.integration.saving_jobs import writing
from tests.integration.test_async_save import files
from tests.integration.test_resharding import Side, assert_equal, go_on, saved_run, state_of

LOSS = 1e-2
"""Largest relative difference of a loss between devices, in bf16."""
DISTRIBUTED = pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed"])


class Here:
    """This process in the place of a world of one worker."""

    def __init__(self, state: ParallelState) -> None:
        self._state = state

    def run(self, function: Callable[..., Any], layout: Layout, *arguments: Any) -> list[Any]:
        return [function(self._state, layout, *arguments)]


@DISTRIBUTED
@pytest.mark.parametrize("made_here", [True, False], ids=["from here", "to here"])
def test_goes_on_elsewhere(
    made_here: bool, distributed: bool, here_nightly: ParallelState, world: World, tmp_path: Path
):
    """Every tensor to the bit, and the losses of the run that was not stopped."""
    places = [Here(here_nightly), world]
    saving, loading = places if made_here else reversed(places)
    side = Side(distributed=distributed, bf16=True)
    found = saved_run(saving, "cyclic", side, tmp_path)
    again = go_on(loading, found, "cyclic", side, tmp_path / "again")
    assert_equal(state_of(found.folder), state_of(again.folder))
    expected = {step: found.losses[step] for step in (4, 5, 6)}
    assert again.losses == pytest.approx(expected, rel=LOSS)


@DISTRIBUTED
def test_an_async_save_holds_the_moment_it_began(
    distributed: bool, here: ParallelState, tmp_path: Path
):
    """The same state is saved at once and, while three more steps are trained, beside them."""
    side = Side(distributed=distributed, bf16=True)
    flags = [*side.flags, "--save", str(tmp_path / "beside"), "--async-save"]
    run = prepare(RunPlan.of(config_of(Layout(), flags), here.world_size), here)
    beside, at_once = run.saver, Saver(CheckpointConfig(save=str(tmp_path / "once")), here)
    batches = run.data.train_batches(0)
    for step in (1, 2):
        train_step(run, batches, step)
    run.saver = at_once
    save(run)
    run.saver = beside
    trained_on = threading.Event()

    def after_training(write: Callable[..., None], *arguments: Any) -> None:
        assert trained_on.wait(60)
        write(*arguments)

    before = gather_by_name(stages(run), here)
    with writing(after_training):
        save(run)
        losses = [train_step(run, batches, step).loss for step in (3, 4, 5)]
        trained_on.set()
        settle(run, wait=True, last=True)
    beside.close()
    assert all(map(math.isfinite, losses))
    now = gather_by_name(stages(run), here)
    assert all((now[name] != weight).any() for name, weight in before.items())
    once = files(tmp_path / "once")
    assert once and once == files(tmp_path / "beside")
