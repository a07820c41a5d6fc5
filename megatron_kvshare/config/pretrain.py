"""The command line of ``kvshare pretrain``: settings, rules and help in one place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_kvshare.config.data_files import with_paths_of_files
from megatron_kvshare.config.deepspeed import DEEPSPEED_RULES, ENGINE_RULES, agree, all_given
from megatron_kvshare.config.derive import batch_layout
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.config.flags.megatron_flags import MEGATRON_FLAGS
from megatron_kvshare.config.flags.rule import Rule, broken
from megatron_kvshare.config.launch import launch_faults, number_faults
from megatron_kvshare.config.rules.model import (
    MODEL_RULES,
    PARALLEL_RULES,
    SHARING_RULES,
)
from megatron_kvshare.config.rules.pipeline import PIPELINE_RULES, microbatch_faults
from megatron_kvshare.config.rules.run import (
    RUN_RULES,
    batch_fits,
    stage_faults,
    world_size_faults,
)
from megatron_kvshare.config.rules.solver import (
    SOLVER_RULES,
    recipe_warnings,
    subsets_fit_sequence_parallel,
)
from megatron_kvshare.errors import Fault
from megatron_kvshare.sharing import patterns
from megatron_kvshare.sharing.map import SharingMap

_DESCRIPTION = """
Pretrain a Llama-shaped decoder whose layers share keys and values. Flags keep Megatron's names;
Megatron's selecting flags (--swiglu, --group-query-attention, --normalization RMSNorm, ...) are
accepted and not needed. Start it alone, or on several processes with torchrun.
"""

_EXAMPLES = """
# what would run, and does it fit? Needs no GPU and no other process:
kvshare pretrain --config run.yaml --dry-run
# a small model on made-up tokens:
kvshare pretrain --mock-data --vocab-size 1000 --num-layers 4 --hidden-size 64 \\
    --num-attention-heads 4 --seq-length 128 --train-iters 10
# half the KV cache: 11 of 22 layers own keys and values, the middle block reads its top layer:
torchrun --nproc_per_node 8 -m megatron_kvshare pretrain \\
    --kv-pattern sandwich-top --kv-layers 11 --num-query-groups 4 \\
    --data-path data/corpus --tokenizer-model data/tokenizer.model \\
    --global-batch-size 256 --train-iters 10000 --lr-warmup-fraction 0.01 --bf16 \\
    --save runs/top --resume auto --save-interval 1000
# the same settings in a file, one changed:
kvshare pretrain --config run.yaml --kv-pattern pizza-bottom
"""

_LAYOUT_RULES: tuple[Rule[Any], ...] = (
    *MODEL_RULES,
    *SHARING_RULES,
    *SOLVER_RULES,
    *PARALLEL_RULES,
    *PIPELINE_RULES,
    subsets_fit_sequence_parallel,
)


def parse_pretrain(
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    completed: Callable[[PretrainConfig], PretrainConfig] | None = None,
    starts: bool = False,
) -> PretrainConfig:
    """The checked configuration of a run.

    Args:
        argv: arguments after ``kvshare pretrain``.
        environ: what launchers say of this process is read from it.
        completed: fills in what a checkpoint says, before the rules are checked.
        starts: this process is about to become one of the run's, so all that its launcher says
            is checked.

    Raises:
        ConfigError: with every fault at once.
    """

    settings = (
        "tensor_model_parallel_size pipeline_model_parallel_size micro_batch_size global_batch_size"
    )
    reads = frozenset(settings.split())

    def completed_by_files(
        config: PretrainConfig, given: Mapping[str, str], faulty: frozenset[str]
    ) -> tuple[PretrainConfig, Sequence[Fault]]:
        data, faults = with_paths_of_files(config.data, given)
        config = replace(config, data=data)
        if completed is not None:
            config = completed(config)
        if not config.deepspeed.is_engine:
            return config, faults
        known = not any(number_faults(environ)) and not faulty & reads
        agreement = agree(config, given, world_size(config, environ) if known else None)
        return agreement.config, [*faults, *agreement.faults]

    def launch_fits(config: PretrainConfig) -> Iterable[Fault]:
        whole = starts and not config.dry_run
        return launch_faults(environ) if whole else number_faults(environ)

    def processes_fit(config: PretrainConfig) -> list[Fault]:
        if any(number_faults(environ)):
            return []
        return _process_faults(config, world_size(config, environ))

    processes = (
        Rule(launch_fits, frozenset({"dry_run"})),
        Rule(processes_fit, reads),
    )
    command = Command(
        prog="kvshare pretrain",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
        rules=(*_LAYOUT_RULES, *RUN_RULES, *DEEPSPEED_RULES, *processes),
        megatron=MEGATRON_FLAGS,
        completed=completed_by_files,
    )
    return parse(PretrainConfig, argv, command)


def layout_faults(config: PretrainConfig, world_size: int) -> list[Fault]:
    """What is wrong with running on ``world_size`` processes, were the configuration checked before
    its model, recipe, parallelism or batch were changed."""
    rules = (*_LAYOUT_RULES, *ENGINE_RULES, batch_fits)
    faults = list(broken(rules, config, frozenset())) or _process_faults(config, world_size)
    if not faults and config.deepspeed.is_engine:
        faults = list(agree(config, all_given(), world_size).faults)
    return faults


def _process_faults(config: PretrainConfig, world_size: int) -> list[Fault]:
    faults = list(world_size_faults(config, world_size))
    if faults:
        return faults
    batch = batch_layout(config, world_size)
    faults = list(microbatch_faults(config, batch.num_microbatches))
    return faults + list(stage_faults(config, batch.global_batch_size))


def world_size(config: PretrainConfig, environ: Mapping[str, str] = os.environ) -> int:
    """Number of processes, of which the rules have seen that it is one. A dry run outside torchrun
    plans for one copy of the model."""
    if "WORLD_SIZE" in environ:
        return int(environ["WORLD_SIZE"])
    return config.parallel.model_parallel_size if config.dry_run else 1


def pretrain_warnings(config: PretrainConfig, sharing_map: SharingMap) -> list[str]:
    """What is allowed and probably not meant, one sentence each."""
    train, checkpoint, parallel = config.train, config.checkpoint, config.parallel
    found = list(patterns.warnings(sharing_map, config.sharing.window_size))
    found += recipe_warnings(config.sharing, sharing_map)
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        found.append("--sequence-parallel has no effect with --tensor-model-parallel-size 1")
    if train.lr_wsd_decay_iters is not None and train.lr_decay_style != "WSD":
        found.append(f"--lr-wsd-decay-iters has no effect with {train.lr_decay_style} decay")
    if checkpoint.load is None and (checkpoint.no_load_optim or checkpoint.no_load_rng):
        found.append("--no-load-optim and --no-load-rng have no effect without --load")
    if checkpoint.async_save and config.deepspeed.is_engine:
        found.append("--async-save has no effect: DeepSpeed writes while the training waits")
    if checkpoint.load is None and checkpoint.ckpt_step is not None:
        found.append("--ckpt-step has no effect without --load")
    if checkpoint.save is None and not config.dry_run:
        found.append("nothing will be saved: give --save FOLDER to keep the model")
    if config.log.wandb_exp_name is not None and config.log.wandb_project is None:
        found.append("--wandb-exp-name has no effect without --wandb-project")
    return found
