"""Out of memory: one message, with the estimate by part and what would help, ends all ranks.

Nothing is saved: that takes memory, and the ranks are in the middle of a step. The newest
checkpoint is the one to go on from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_kvshare.data.vocabulary import resolve_vocabulary
from megatron_kvshare.errors import Fault, OutOfMemoryError
from megatron_kvshare.megatron_api.memory import Shortage, shortage
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.memory_advice import Job, advice
from megatron_kvshare.train.notes import Notes
from megatron_kvshare.train.report import by_part, mib
from megatron_kvshare.train.watchdog import Pulse

T = TypeVar("T")


def within_memory(
    work: Callable[[], T],
    planned: RunPlan,
    state: ParallelState,
    pulse: Pulse,
    release: Callable[[], None] = lambda: None,
) -> T:
    """What ``work()`` returns. Where it runs out of memory on one rank, all ranks end, whatever
    they wait for, with the exit code of :class:`OutOfMemoryError` and one message. ``release``
    gives back what this process holds for others to have; called where it ends here.

    Raises:
        OutOfMemoryError: in a world of one process; the processes of a larger one end here.
    """
    notes = Notes(state, release)
    notes.listen()
    try:
        return work()
    except (Exception, SystemExit) as error:
        found = shortage(error)
        if found is None:
            notes.heed()
            raise
    finally:
        notes.stop_listening()
    # After the except block: the error is gone, and with it the tensors that its frames held.
    notes.end_all(OutOfMemoryError(_fault(found, planned, state, pulse)))


def _fault(found: Shortage, planned: RunPlan, state: ParallelState, pulse: Pulse) -> Fault:
    now, device = pulse.now, state.platform.device
    memory = "host memory" if found.on_host else str(device)
    where = f"step {now.step}, {now.what}, rank {state.rank} on {memory}"
    # Read again: what runs out of memory first is the building of what knows it otherwise.
    config = planned.config
    vocabulary = resolve_vocabulary(config.data, config.model.vocab_size)
    job = Job(planned, planned.spec(vocabulary.size), now.what)
    estimate = by_part(planned.memory(job.spec))
    rule = f"memory per process, estimated: {estimate}{_measured(device)}"
    choices = "".join(f"\n  {line}" for line in advice(job, found))
    return Fault(where, found.said, rule, f"one or several of these (estimate with each):{choices}")


def _measured(device: torch.device) -> str:
    """What the device has, and what was allocated on it."""
    if device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    peak = torch.cuda.max_memory_allocated(device)
    return f"; the device has {mib(total)}, of which at most {mib(peak)} were allocated at once"
