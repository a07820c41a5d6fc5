"""``kvshare pretrain``: train a model, alone or as one of a launcher's processes."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_kvshare.checkpoint.recipe import with_recipe_of_checkpoint
from megatron_kvshare.config.launch import launched, speaks, told_once
from megatron_kvshare.config.pretrain import (
    parse_pretrain,
    pretrain_warnings,
    world_size,
)
from megatron_kvshare.errors import EXIT_STOPPED
from megatron_kvshare.output import complain
from megatron_kvshare.spec.run_plan import RunPlan


def run(argv: Sequence[str]) -> int:
    """Check the configuration, then train, or with ``--dry-run`` only say what would run.

    Returns:
        0, or EXIT_STOPPED where training was stopped before its last step.
    """
    completed = partial(with_recipe_of_checkpoint, say=_note)
    with told_once():
        config = parse_pretrain(argv, completed=completed, starts=True)
        planned = RunPlan.of(config, world_size(config))
    config = planned.config
    if speaks():
        for warning in (*pretrain_warnings(config, planned.plan.map), *planned.warnings):
            complain(f"warning: {warning}")
    # torch and megatron-core take seconds to import: not before the configuration is right.
    if config.dry_run:
        _plan(planned)
        return 0
    return EXIT_STOPPED if _train(planned, argv) and not _would_start_again() else 0


def _note(text: str) -> None:
    if speaks():
        complain(f"note: {text}")


def _would_start_again() -> bool:
    """Whether torchrun takes any exit code but 0 for a failure to be repaired by a restart."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def _plan(planned: RunPlan) -> None:
    """Print what would run; without a process group, so one process is enough for any layout."""
    from megatron_kvshare.data.data_plan import plan_data
    from megatron_kvshare.data.vocabulary import resolve_vocabulary
    from megatron_kvshare.train import report
    from megatron_kvshare.train.setup import data_request

    config = planned.config
    vocabulary = resolve_vocabulary(config.data, config.model.vocab_size)
    data = plan_data(config.data, data_request(planned, vocabulary))
    spec = planned.spec(vocabulary.size, vocabulary.fingerprint)
    if speaks():
        for warning in data.warnings(config.data.max_epochs):
            complain(f"warning: {warning}")
        print(report.start(planned, spec, data, device="planned"))
        print("Dry run: nothing was trained.")


def _train(planned: RunPlan, argv: Sequence[str]) -> bool:
    """Whether training was stopped early."""
    # megatron-core's notes on packages that are not installed: `kvshare doctor` says it better.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    from megatron_kvshare.megatron_api import parallel, platform
    from megatron_kvshare.train.pretrain import pretrain
    from megatron_kvshare.train.report import Typed

    config = planned.config
    if config.train.deterministic_mode:
        platform.use_deterministic_algorithms()
    try:
        state = parallel.initialize(
            config.parallel.tensor_model_parallel_size,
            config.parallel.pipeline_model_parallel_size,
            planned.placement.chunks,
            config.parallel.distributed_backend,
            config.parallel.distributed_timeout_minutes,
            launched(),
        )
        typed = Typed(_command(argv), _program("kvshare", "megatron_kvshare"))
        return bool(pretrain(planned, state, typed).stopped_by)
    finally:
        parallel.destroy()


class _Launcher(NamedTuple):
    """``processes``: the variable with their number on this node; then how it is started, and what
    goes before that number and before the module that it runs."""

    processes: str
    name: str
    module: str
    number: str
    runs: str


_LAUNCHERS = (
    _Launcher("LOCAL_WORLD_SIZE", "torchrun", "torch.distributed.run", "--nproc_per_node", "-m"),
    _Launcher("LOCAL_SIZE", "deepspeed", "deepspeed.launcher.runner", "--num_gpus", "--module"),
)


def _command(argv: Sequence[str]) -> list[str]:
    """What to type to run the same once more, its launcher included."""
    for each in _LAUNCHERS:
        number = os.environ.get(each.processes, "1")
        if number != "1":
            start = [*_program(each.name, each.module), each.number, number, each.runs]
            return [*start, "megatron_kvshare", "pretrain", *argv]
    return [*_program("kvshare", "megatron_kvshare"), "pretrain", *argv]


def _program(name: str, module: str) -> list[str]:
    """Words that start the program again: by name where the shell finds it, else as a module."""
    if shutil.which(name):
        return [name]
    python = Path(sys.executable)
    near = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return [str(near), "-m", module]
