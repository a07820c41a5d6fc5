"""When a run saves, and what a save that fails means for it."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator

import torch

from megatron_kvshare import __version__
from megatron_kvshare.checkpoint.manifest import Manifest
from megatron_kvshare.checkpoint.save import Written
from megatron_kvshare.config.flags.describe import as_dict
from megatron_kvshare.errors import CheckpointError, OwnershipError
from megatron_kvshare.train.agreement import together, warn
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.watchdog import SAVING

_TOLERATED = 1
"""Saves in a row that may fail: a file system may have a bad moment, but not for ever."""


def save(run: Run, last: bool = False, remove_older: bool = True) -> None:
    """Save the run to ``--save``, or begin to; all ranks call this.

    ``last``: nothing comes after it, so it is waited for and must not fail. Before that a save
    that fails is a warning, and two in a row are an error. ``remove_older``: as far as
    ``--keep-last`` lets them go.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are intact.
        OwnershipError: another run has taken over the folder.
    """
    run.pulse.beat(SAVING)
    assert run.saver is not None
    settle(run, wait=True, last=last)
    with _failures(run, last):
        with run.engine.state_shards(not run.config.checkpoint.no_save_optim) as content:
            written = run.saver.save(_manifest(run), content, remove_older)
        _note(run, written)
    if last:
        settle(run, wait=True, last=True)


def settle(run: Run, wait: bool = False, last: bool = False) -> None:
    """Take note of a save that has come to its end beside the training; all ranks call this.

    ``wait``: let it come to its end; ``last`` and errors as in :func:`save`.
    """
    if run.saver is None or not run.saver.is_busy or not (wait or run.saver.is_done()):
        return
    with _failures(run, last):
        _note(run, run.saver.finish())


@contextlib.contextmanager
def _failures(run: Run, last: bool) -> Iterator[None]:
    """Saves fail on all ranks together."""
    try:
        yield
    except CheckpointError as error:
        run.failed_saves += 1
        if last or run.failed_saves > _TOLERATED:
            with together(run.state):
                raise
        warn(run.state, f"training goes on and saves again when it is due. {error}")
    except OwnershipError:
        with together(run.state):
            raise


def _note(run: Run, written: Written | None) -> None:
    if written is not None:
        run.saved, run.failed_saves = written.folder, 0
        warn(run.state, *written.warnings)


def _manifest(run: Run) -> Manifest:
    config, state = run.config, run.state
    return Manifest(
        identity=run.spec.identity,
        progress=run.progress,
        tensor_parallel=state.tp_size,
        pipeline_parallel=state.pp_size,
        data_parallel=state.dp_size,
        has_optimizer=not config.checkpoint.no_save_optim,
        config=as_dict(config),
        data=run.data.identity,
        tracking=dict(run.tracking),
        versions={
            "megatron_kvshare": __version__,
            "torch": torch.__version__,
            "megatron-core": importlib.metadata.version("megatron-core"),
        },
    )
