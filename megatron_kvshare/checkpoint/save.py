"""Saving a checkpoint: written aside, renamed when complete, announced in the tracker last. At
once, or beside the training that goes on (``--async-save``)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_kvshare.checkpoint import folder as folders
from megatron_kvshare.checkpoint.folder import KEEP_ALL, Keep, remove_superseded
from megatron_kvshare.checkpoint.integrity import mark_files
from megatron_kvshare.checkpoint.manifest import Layout, Manifest
from megatron_kvshare.checkpoint.parts import (
    RANDOM_STATE,
    UPDATES,
    OptimizerState,
    Part,
    optimizer_parts,
    random_state,
    single_parts,
    weight_parts,
)
from megatron_kvshare.checkpoint.storage import write_parts
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.errors import CheckpointError, Fault, OwnershipError
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.ownership.aside import remove

Check = Callable[[], None]
"""Raises OwnershipError where the folder has become another run's."""


def nobody_else() -> None:
    """The check of a folder that nobody else knows of."""


class Content(NamedTuple):
    """What this rank has for a checkpoint: ``parts`` of tensors, views of the memory that training
    goes on with, and files of another ``layout`` than ours, which ``beside`` writes into a folder.

    All ranks call ``beside``; it raises OSError on all of them where one cannot write.
    """

    parts: Sequence[Part]
    layout: Layout = "native"
    beside: Callable[[Path], None] | None = None


class Written(NamedTuple):
    """A complete checkpoint; ``warnings``: older ones that should have gone and are still there."""

    folder: Path
    warnings: Sequence[str]


def save_checkpoint(
    root: Path,
    manifest: Manifest,
    models: Sequence[KVShareGPT],
    optimizer: OptimizerState | None,
    state: ParallelState,
) -> Path:
    """Save the weights of ``models``, this rank's pipeline stages, ``optimizer`` (None: leave it
    out) and random state; all ranks call this.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: on all ranks; it could not be written, earlier checkpoints are intact.
    """
    return write_checkpoint(root, manifest, content(models, optimizer, state), state).folder


def content(
    models: Sequence[KVShareGPT], optimizer: OptimizerState | None, state: ParallelState
) -> Content:
    """All of it as parts of tensors, without optimizer state if there is none."""
    parts = weight_parts(models, state)
    if optimizer is not None:
        parts += optimizer_parts(optimizer, models, state)
        parts += _updates(optimizer, state)
    return Content([part for part in (*parts, *_generators(state)) if part.ours])


def content_beside(
    write: Callable[[Path], None], optimizer: OptimizerState, state: ParallelState
) -> Content:
    """Weights and optimizer state in files that DeepSpeed writes (``write``), the rest as parts."""
    parts = [*_updates(optimizer, state), *_generators(state)]
    return Content([part for part in parts if part.ours], "deepspeed", write)


def _updates(optimizer: OptimizerState, state: ParallelState) -> list[Part]:
    count = torch.tensor([optimizer.updates])
    return single_parts("", {UPDATES: count}, ours=state.is_first)


def _generators(state: ParallelState) -> list[Part]:
    return single_parts(f"{RANDOM_STATE}{state.rank}.", random_state(state.platform.device))


def write_checkpoint(
    root: Path,
    manifest: Manifest,
    content: Content,
    state: ParallelState,
    group: dist.ProcessGroup | None = None,
    keep: Keep = KEEP_ALL,
    check: Check = nobody_else,
) -> Written:
    """Write the ``content`` of all ranks as the checkpoint of the manifest's step; then ``keep``
    says which older ones stay.

    All ranks call this; they talk in ``group``, None: the group of the job. ``check`` is asked on
    the first rank before anything is touched that has a name.

    Raises:
        CheckpointError: on all ranks; earlier checkpoints and the tracker are as they were.
        OwnershipError: the same, because ``check`` says that the folder is another run's.
    """
    step = manifest.progress.step
    target = folders.iteration_folder(root, step, content.layout)
    once = partial(_on_first_rank, state=state, group=group)
    aside: Path | None = None
    try:
        aside = Path(once(lambda: _begin(target, check)))
        write_parts(content.parts, aside, group)
        if content.beside is not None:
            content.beside(aside)
        marked = replace(manifest, layout=content.layout, files=mark_files(aside, state, group))
        once(lambda: _complete(marked, aside, target, check))
        warnings = once(lambda: _tidy(root, step, keep, check))
    except (OSError, OwnershipError) as error:  # not what communication raises: a lost rank
        if state.is_first and aside is not None:
            remove(aside)
        if isinstance(error, OwnershipError):
            raise
        fix = "free space or permissions there, or choose another --save folder"
        rule = f"it cannot be written: {error}"
        raise CheckpointError(Fault("--save", str(target), rule, fix)) from error
    return Written(target, warnings)


def _begin(target: Path, check: Check) -> str:
    check()
    return str(folders.begin(target))


def _complete(manifest: Manifest, aside: Path, target: Path, check: Check) -> None:
    manifest.write(aside)
    folders.flush(aside)
    check()
    folders.publish(aside, target, manifest.progress.step)


def _tidy(root: Path, step: int, keep: Keep, check: Check) -> list[str]:
    check()
    return remove_superseded(root, step, keep)


def _on_first_rank(
    action: Callable[[], Any], state: ParallelState, group: dist.ProcessGroup | None
) -> Any:
    """Run ``action`` on rank 0 and return its result, or raise its failure, on every rank."""
    outcome: list[Any] = [None, None]
    if state.is_first:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = str(error)
        except OwnershipError as error:
            outcome[1] = error.faults
    dist.broadcast_object_list(outcome, src=0, group=group)
    if isinstance(outcome[1], str):
        raise OSError(outcome[1])
    if outcome[1] is not None:
        raise OwnershipError(outcome[1])
    return outcome[0]


class Saver:
    """Writes one checkpoint after another; all ranks call the same methods in the same order.

    With ``--async-save`` a thread of each rank writes a copy of the parts, by the code that saves
    at once. The threads talk in a group of their own, so that they never meet the training's
    communication, and one save is finished before the next is begun.
    """

    def __init__(
        self, settings: CheckpointConfig, state: ParallelState, check: Check = nobody_else
    ) -> None:
        """``check``: asked on the first rank before anything gets its name or goes."""
        assert settings.save is not None
        self._root = Path(settings.save)
        self._keep = Keep(settings.keep_last, settings.keep_every)
        self._state, self._check = state, check
        self._group = dist.new_group(backend="gloo") if settings.async_save else None
        self._copies: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._running: Future[Written] | None = None
        self._thread: threading.Thread | None = None

    def save(
        self, manifest: Manifest, content: Content, remove_older: bool = True
    ) -> Written | None:
        """Write ``content``; None if that has only begun. It may change after the return.

        ``remove_older``: then remove the checkpoints that the settings let go.

        Raises:
            CheckpointError: on all ranks; earlier checkpoints are intact.
        """
        assert self._running is None, "finish the save before"
        keep = self._keep if remove_older else KEEP_ALL
        if self._group is None or content.beside is not None:  # who writes that has no copies
            return self._write(manifest, content, keep)
        copies = content._replace(parts=self._copied(content.parts))
        self._running = Future()
        self._thread = threading.Thread(
            target=self._run, args=(self._running, manifest, copies, keep), name="save", daemon=True
        )
        self._thread.start()
        return None

    @property
    def is_busy(self) -> bool:
        """A save has begun whose end nobody has asked for; the same on all ranks."""
        return self._running is not None

    def is_done(self) -> bool:
        """Whether that save has come to its end on all ranks; they all get the same answer."""
        assert self._running is not None
        done = torch.tensor(int(self._running.done()), device=self._state.platform.device)
        if self._state.world_size > 1:
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())

    def finish(self) -> Written:
        """Wait for the end of that save.

        Raises:
            CheckpointError: on all ranks; it could not be written.
        """
        assert self._running is not None
        running, self._running = self._running, None
        return running.result()

    def close(self) -> None:
        """Let a save that has begun come to its end, whatever happens to the run."""
        if self._thread is not None:
            self._thread.join()
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._thread = self._group = None
        self._copies.clear()

    def _run(
        self, running: Future[Written], manifest: Manifest, content: Content, keep: Keep
    ) -> None:
        try:
            running.set_result(self._write(manifest, content, keep))
        except BaseException as error:  # told by finish()
            running.set_exception(error)

    def _write(self, manifest: Manifest, content: Content, keep: Keep) -> Written:
        how = (self._state, self._group, keep, self._check)
        return write_checkpoint(self._root, manifest, content, *how)

    def _copied(self, parts: Sequence[Part]) -> list[Part]:
        """Copies in host memory, which is kept: finding new memory costs more than copying."""
        on_gpu = self._state.platform.is_gpu
        copies = []
        for part in parts:
            key = (part.name, part.offset)
            if key not in self._copies:
                self._copies[key] = torch.empty(
                    part.data.shape, dtype=part.data.dtype, pin_memory=on_gpu
                )
            self._copies[key].copy_(part.data, non_blocking=on_gpu)
            copies.append(part._replace(data=self._copies[key]))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies
