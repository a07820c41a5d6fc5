"""Saving during a run: at once, or beside the training that goes on (``--async-save``)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_kvshare.checkpoint.manifest import Manifest
from megatron_kvshare.checkpoint.parts import Part
from megatron_kvshare.checkpoint.retention import KEEP_ALL, Keep
from megatron_kvshare.checkpoint.save import Check, Written, nobody_else, write_checkpoint
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.megatron_api.parallel import ParallelState


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
        self, manifest: Manifest, parts: Sequence[Part], remove_older: bool = True
    ) -> Written | None:
        """Write ``parts``; None if that has only begun. ``parts`` may change after the return.

        ``remove_older``: then remove the checkpoints that the settings let go.

        Raises:
            CheckpointError: on all ranks; earlier checkpoints are intact.
        """
        assert self._running is None, "finish the save before"
        keep = self._keep if remove_older else KEEP_ALL
        if self._group is None:
            return self._write(manifest, parts, keep)
        copies = self._copied(parts)
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
        self, running: Future[Written], manifest: Manifest, parts: Sequence[Part], keep: Keep
    ) -> None:
        try:
            running.set_result(self._write(manifest, parts, keep))
        except BaseException as error:  # told by finish()
            running.set_exception(error)

    def _write(self, manifest: Manifest, parts: Sequence[Part], keep: Keep) -> Written:
        how = (self._state, self._group, keep, self._check)
        return write_checkpoint(self._root, manifest, parts, *how)

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
