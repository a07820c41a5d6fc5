"""From a configuration to a :class:`Run`, in named steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from megatron_kvshare.checkpoint.load import (
    Found,
    chosen,
    find_checkpoint,
    newest_sound,
)
from megatron_kvshare.checkpoint.manifest import (
    Health,
    Progress,
    check_data,
    tokens_after_move,
)
from megatron_kvshare.checkpoint.save import Saver
from megatron_kvshare.config import CheckpointConfig, PretrainConfig
from megatron_kvshare.data import train_data
from megatron_kvshare.data.data_plan import DataRequest
from megatron_kvshare.data.vocabulary import Vocabulary, resolve_vocabulary
from megatron_kvshare.engines import build_engine
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects
from megatron_kvshare.model.gpt import build_stages
from megatron_kvshare.model.parameters import initialize
from megatron_kvshare.sharing.solver import Recipe
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.agreement import together, warn
from megatron_kvshare.train.compiled_kernels import with_sound_kernels
from megatron_kvshare.train.learning_rate import schedule_change
from megatron_kvshare.train.owning import Owner
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.sinks import promised_checkpoints
from megatron_kvshare.train.watchdog import BUILDING, COMPILING, LOADING, Pulse


def data_request(planned: RunPlan, vocabulary: Vocabulary) -> DataRequest:
    """What the run reads."""
    config = planned.config
    return DataRequest(
        seq_length=config.model.seq_length,
        global_batch_size=planned.batch.global_batch_size,
        train_iters=config.train.train_iters,
        eval_iters=config.train.eval_iters,
        seed=config.train.seed,
        vocabulary=vocabulary,
        stages=planned.data_stages,
        reads_test=bool(config.data.test_data_path),
    )


def prepare(
    planned: RunPlan,
    state: ParallelState,
    pulse: Pulse | None = None,
    owner: Owner | None = None,
) -> Run:
    """Open the data, build the model and its optimizer, continue from a checkpoint if there is one;
    ``pulse`` is told. ``owner``: of what the run writes to.

    Raises:
        KVShareError: on the first rank with a fault; the others leave with it.
    """
    pulse, owner = pulse or Pulse(), owner or Owner()
    config = planned.config
    torch.manual_seed(config.train.seed)
    settings, iteration = _to_load(planned, state)
    with together(state):
        vocabulary = resolve_vocabulary(config.data, config.model.vocab_size)
        data = _open_data(planned, vocabulary, state)
        spec = planned.spec(vocabulary.size, vocabulary.fingerprint)
        found = find_checkpoint(settings, spec.identity, state.world_size, iteration)
        changes = [] if found is None else check_data(found.manifest, data.identity, settings)
    warn(state, *(f"--data-change-ok: {change}" for change in changes))
    warn(state, *data.plan.warnings(config.data.max_epochs))
    progress = Progress(health=Health(fresh=True)) if found is None else found.progress
    if found is not None and progress.samples:
        progress = _with_sources(found, data, changed=bool(changes))
    warn(state, *_schedule_changes(config, found))
    pulse.beat(COMPILING)
    spec = with_sound_kernels(spec, planned.plan, config.train.micro_batch_size, state)
    pulse.beat(BUILDING)
    stages = build_stages(
        spec, config.parallel, planned.plan, planned.placement.stages_of(state.pp_rank), state
    )
    if found is None:
        for stage in stages:
            initialize(stage, config.train.seed)
    engine = build_engine(planned, stages, state)
    if found is not None:
        pulse.beat(LOADING)
        with together(state):
            engine.load(found)
    return Run(
        planned=planned,
        spec=spec,
        state=state,
        data=data,
        engine=engine,
        progress=progress,
        pulse=pulse,
        owner=owner,
        saver=Saver(config.checkpoint, state, owner.check) if config.checkpoint.save else None,
        saved=None if found is None else found.stays,
        continued=None if found is None or settings.finetune else found.folder,
        tracking={} if found is None or settings.finetune else found.manifest.tracking,
    )


def _with_sources(found: Found, data: train_data.TrainData, changed: bool) -> Progress:
    """The progress of a checkpoint, with tokens by the names that the sources have today.

    Before format 9 they were not counted: what the data says has been read is what was read, unless
    it has changed; then they count from here on.
    """
    stored = found.progress
    if stored.tokens_by_source:
        names = tokens_after_move(stored.tokens_by_source, found.manifest.data, data.identity)
    else:
        names = {} if changed else data.tokens_by_source(0, stored.samples)
    return replace(stored, tokens_by_source=names)


def _schedule_changes(config: PretrainConfig, found: Found | None) -> list[str]:
    """What a resume with other flags does to the learning rate."""
    if found is None or found.progress.step == 0 or found.progress.step >= config.train.train_iters:
        return []
    change = schedule_change(found.manifest.config, config.train, found.progress.step)
    return [] if change is None else [change]


def _check_same_recipe(recipe: Recipe) -> None:
    """Every rank took it from the checkpoint it saw: file systems may show them different ones."""
    recipes = gather_objects(str(recipe))
    if len(set(recipes)) > 1:
        rule = "ranks have read different recipes, so they do not see the same checkpoints"
        fix = "use a folder that all nodes see, or name the recipe by --kv-recipe"
        raise CheckpointError(Fault("--kv-recipe", ", ".join(recipes), rule, fix))


def _to_load(planned: RunPlan, state: ParallelState) -> tuple[CheckpointConfig, int | None]:
    """The settings with ``--resume auto`` carried out, and the checkpoint to continue from, None
    without one; says which are damaged."""
    config = planned.config
    with together(state):
        _check_same_recipe(planned.recipe)
        settings = chosen(planned.checkpoint, state, partial(promised_checkpoints, config))
    with together(state):
        newest = newest_sound(settings, state)
    warn(state, *newest.warnings)
    return settings, newest.iteration


def _open_data(
    planned: RunPlan, vocabulary: Vocabulary, state: ParallelState
) -> train_data.TrainData:
    config = planned.config
    share = train_data.RankShare(
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=state.dp_rank,
        dp_size=state.dp_size,
    )
    return train_data.build(config.data, data_request(planned, vocabulary), share)
