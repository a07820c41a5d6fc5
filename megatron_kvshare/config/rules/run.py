"""Rules of a training run: batch, learning rate, data, checkpoints, logs, processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_kvshare.config.blend import parse_blend, parse_split
from megatron_kvshare.config.data_files import PARTS, order_faults, read_stages
from megatron_kvshare.config.fields.data import DataConfig
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.config.flags.rule import multiples, rule
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.errors import ConfigError, Fault


@rule("global_batch_size micro_batch_size")
def batch_fits(config: PretrainConfig) -> Iterator[Fault]:
    """A global batch is cut into whole micro-batches."""
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    if batch is not None and batch % micro:
        yield Fault(
            "--global-batch-size",
            batch,
            f"it must be divisible by --micro-batch-size {micro}",
            f"use --global-batch-size {multiples(batch, micro)}",
        )


@rule("profile profile_step_start profile_step_end train_iters")
def profile_fits(config: PretrainConfig) -> Iterator[Fault]:
    """There are steps to profile."""
    log, last = config.log, config.train.train_iters
    start, end = log.profile_step_start, log.profile_step_end
    if not log.profile:
        return
    if start > last:
        fix = f"use --profile-step-start {max(last - 1, 1)} --profile-step-end {last + 1}"
        yield Fault("--profile-step-start", start, f"the run ends with step {last}", fix)
    elif end <= start:
        fix = f"use --profile-step-end {start + 2}"
        yield Fault(
            "--profile-step-end", end, f"it must be above --profile-step-start {start}", fix
        )


@rule("profile use_pytorch_profiler")
def profiler_is_asked_for(config: PretrainConfig) -> Iterator[Fault]:
    """torch's profiler is a kind of profile."""
    if config.log.use_pytorch_profiler and not config.log.profile:
        rule_text = "it says how --profile profiles"
        yield Fault("--use-pytorch-profiler", "given", rule_text, "add --profile")


_DETERMINISTIC = {
    "NCCL_ALGO": ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}
"""Values under which these libraries add in one order. Left out, the first of CUBLAS's and Ring are
set, see ``megatron_api/platform.py``."""


@rule("deterministic_mode")
def environment_is_deterministic(config: PretrainConfig) -> Iterator[Fault]:
    """What the environment says does not contradict --deterministic-mode."""
    for name, values in _DETERMINISTIC.items():
        value = os.environ.get(name)
        if config.train.deterministic_mode and value is not None and value not in values:
            rule_text = f"under --deterministic-mode it is one of {', '.join(values)}"
            yield Fault(f"environment variable {name}", value, rule_text, f"unset {name}")


@rule("lr min_lr")
def learning_rates_are_ordered(config: PretrainConfig) -> Iterator[Fault]:
    """The schedule goes down, not up."""
    train = config.train
    if train.min_lr > train.lr:
        fix = f"use --min-lr {train.lr / 10:g} (a tenth of --lr)"
        yield Fault("--min-lr", train.min_lr, f"it must be at most --lr {train.lr:g}", fix)


@rule("lr_warmup_iters lr_warmup_fraction lr_decay_iters train_iters")
def warmup_fits(config: PretrainConfig) -> Iterator[Fault]:
    """Warm-up is given one way and ends before the decay does."""
    train = config.train
    if train.lr_warmup_fraction is not None and train.lr_warmup_iters:
        rule_text = f"it excludes --lr-warmup-fraction {train.lr_warmup_fraction:g}"
        yield Fault("--lr-warmup-iters", train.lr_warmup_iters, rule_text, "give only one of them")
    elif train.warmup_iters >= train.decay_iters:
        by_fraction = train.lr_warmup_fraction is not None
        flag = "--lr-warmup-fraction" if by_fraction else "--lr-warmup-iters"
        value = train.lr_warmup_fraction if by_fraction else train.lr_warmup_iters
        fix = f"use {flag} {0.01 if by_fraction else max(train.decay_iters // 100, 0)}"
        rule_text = f"warm-up must end before the decay does, at step {train.decay_iters}"
        yield Fault(flag, value, rule_text, fix)


@rule(
    "lr_decay_style lr_wsd_decay_iters lr_decay_iters train_iters lr_warmup_iters"
    " lr_warmup_fraction"
)
def wsd_fits(config: PretrainConfig) -> Iterator[Fault]:
    """Warm-up-stable-decay needs to know how long the decay is, and it begins after the warm-up."""
    train, flag = config.train, "--lr-wsd-decay-iters"
    if train.lr_decay_style != "WSD":
        return
    left = train.decay_iters - train.warmup_iters
    usual = min(max(train.decay_iters // 10, 1), max(left, 1))
    fix = f"use {flag} {usual} (a tenth of the {train.decay_iters} steps)"
    if train.lr_wsd_decay_iters is None:
        yield Fault(flag, None, "--lr-decay-style WSD needs it", fix)
    elif train.lr_wsd_decay_iters > left > 0:
        rule_text = (
            f"it must be at most {left}, what the {train.decay_iters} steps of the schedule leave"
            f" after {train.warmup_iters} of warm-up; else the rate would jump at the end of that"
        )
        yield Fault(flag, train.lr_wsd_decay_iters, rule_text, fix)


_DATA_PATHS = ("data_path", *(f"{part}_data_path" for part in PARTS))
_DATA_FILES = ("data_args_path", "per_split_data_args_path")


@rule(" ".join([*_DATA_PATHS, *_DATA_FILES, "mock_data"]))
def data_is_given(config: PretrainConfig) -> Iterator[Fault]:
    """There is something to train on, named in one way."""
    data = config.data
    per_part = any(getattr(data, f"{part}_data_path") for part in PARTS)
    if data.mock_data:
        return
    if data.data_path and per_part:
        rule_text = "it excludes --train-data-path, --valid-data-path and --test-data-path"
        fix = "give --data-path with --split, or a path for each part without it"
        yield Fault("--data-path", " ".join(data.data_path), rule_text, fix)
    elif per_part and not data.train_data_path:
        rule_text = "there is a path for another part but none for training"
        yield Fault("--train-data-path", None, rule_text, "add --train-data-path PREFIX")
    elif not data.data_path and not per_part:
        if any(getattr(data, name) for name in _DATA_FILES):
            return  # told where the file is read
        rule_text = "there is nothing to train on"
        fix = "give --data-path PREFIX (made by `kvshare preprocess`), or try --mock-data"
        yield Fault("--data-path", None, rule_text, fix)


@rule("test_data_path per_split_data_args_path eval_iters mock_data")
def test_data_is_read(config: PretrainConfig) -> Iterator[Fault]:
    """What is given as test data is read."""
    data = config.data
    if data.test_data_path and not config.train.eval_iters and not data.mock_data:
        rule_text = "it is read by --eval-iters batches, which is 0"
        fix = "add --eval-iters N, or leave the test data out"
        yield Fault("--test-data-path", " ".join(data.test_data_path), rule_text, fix)


@rule(" ".join([*_DATA_PATHS, "data_stages", "mock_data"]))
def data_exists(config: PretrainConfig) -> Iterator[Fault]:
    """Blends are well formed and every prefix has its two files."""
    if config.data.mock_data:
        return
    blends = [(flag_of(name), getattr(config.data, name)) for name in _DATA_PATHS]
    try:
        blends += [(f"{stage.where}: data-path", stage.words) for stage in read_stages(config.data)]
    except ConfigError as error:
        yield from error.faults
    for where, words in blends:
        try:
            sources = parse_blend(where, words)
        except ConfigError as error:
            yield from error.faults
            continue
        for prefix, _ in sources:
            yield from _missing_files(where, prefix)


@rule("data_stages max_epochs mock_data")
def mock_data_has_no_blend(config: PretrainConfig) -> Iterator[Fault]:
    """Made-up tokens have no end and no stages."""
    for name in ("data_stages", "max_epochs"):
        value = getattr(config.data, name)
        if value is not None and config.data.mock_data:
            rule_text = "made-up tokens come from no files"
            yield Fault(flag_of(name), value, rule_text, f"drop {flag_of(name)} or --mock-data")


def _missing_files(flag: str, prefix: str) -> Iterator[Fault]:
    stem, ending = os.path.splitext(prefix)
    if ending in (".bin", ".idx"):
        yield Fault(flag, prefix, "a prefix has no ending", f"write {flag} {stem}")
        return
    missing = [f"{prefix}{end}" for end in (".bin", ".idx") if not os.path.isfile(f"{prefix}{end}")]
    if not missing:
        return
    longer = f"{prefix}_text_document"
    fix = f"make it with `kvshare preprocess --input FILE --output-prefix {prefix} ...`"
    if os.path.isfile(f"{longer}.idx"):
        fix = f"write {flag} {longer}"
    rule_text = f"there is no file {' and no file '.join(missing)}"
    if missing == [f"{prefix}.idx"]:
        rule_text += ", as when `kvshare preprocess` is stopped at its very end"
        fix = "make both files again with `kvshare preprocess`"
    yield Fault(flag, prefix, rule_text, fix)


@rule("split mock_data data_path")
def split_is_valid(config: PretrainConfig) -> Iterator[Fault]:
    """The split is three shares."""
    try:
        parse_split(config.data.split)
    except ConfigError as error:
        yield from error.faults


@rule("tokenizer_type tokenizer_model vocab_size mock_data")
def tokenizer_is_given(config: PretrainConfig) -> Iterator[Fault]:
    """The vocabulary is known: from a tokenizer, or its size is given.

    Without either, indexed data may still carry a note of it; that is judged when it is opened.
    """
    data = config.data
    if data.tokenizer_type == "NullTokenizer":
        if config.model.vocab_size is None:
            fix = "add --vocab-size N (for example 32000)"
            yield Fault("--vocab-size", None, "--tokenizer-type NullTokenizer needs it", fix)
    elif data.tokenizer_type == "ByteLevelTokenizer":
        return
    elif data.tokenizer_model is not None:
        yield from _tokenizer_files(data, data.tokenizer_model)
    elif data.tokenizer_type in ("HuggingFaceTokenizer", "TikTokenizer"):
        rule_text = f"--tokenizer-type {data.tokenizer_type} needs it"
        yield Fault("--tokenizer-model", None, rule_text, "add --tokenizer-model FILE_OR_FOLDER")
    elif data.mock_data and config.model.vocab_size is None:
        fix = "add --vocab-size N (for example 32000)"
        yield Fault("--vocab-size", None, "made-up tokens need a vocabulary size", fix)


def _tokenizer_files(data: DataConfig, name: str) -> Iterator[Fault]:
    is_sentencepiece = data.tokenizer_type == "SentencePieceTokenizer"
    if not os.path.exists(name):
        fix = "give a tokenizer.json or its folder (names on a hub are not looked up)"
        if is_sentencepiece:
            fix = "give the .model file, for example from `kvshare train-tokenizer`"
        yield Fault("--tokenizer-model", name, "there is no such file", fix)
    elif not is_sentencepiece and name.endswith(".model"):
        fix = "use --tokenizer-type SentencePieceTokenizer, or give a Hugging Face folder"
        yield Fault("--tokenizer-model", name, "this is a SentencePiece file", fix)


_OF_SAVING = ("save_interval", "async_save", "keep_last", "keep_every")


@rule(f"save {' '.join(_OF_SAVING)}")
def saving_is_possible(config: PretrainConfig) -> Iterator[Fault]:
    """The folder can be written, and what is said of saving has a folder to go to."""
    checkpoint = config.checkpoint
    if checkpoint.save is not None:
        yield from _writable("--save", checkpoint.save)
        return
    for name in _OF_SAVING:
        value = getattr(checkpoint, name)
        if value:
            flag = flag_of(name)
            fix = f"add --save FOLDER or drop {flag}"
            yield Fault(flag, value, "there is no folder to save to", fix)


@rule("keep_last keep_every")
def something_may_go(config: PretrainConfig) -> Iterator[Fault]:
    """``--keep-every`` is an exception to ``--keep-last``; alone it would say nothing."""
    checkpoint = config.checkpoint
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        rule_text = "all checkpoints stay unless --keep-last says how many"
        fix = "add --keep-last N, or drop --keep-every"
        yield Fault("--keep-every", checkpoint.keep_every, rule_text, fix)


@rule("load finetune")
def loading_is_possible(config: PretrainConfig) -> Iterator[Fault]:
    """``--load`` exists."""
    checkpoint = config.checkpoint
    if checkpoint.load is None:
        if checkpoint.finetune:
            rule_text = "there is nothing to start from"
            yield Fault("--finetune", True, rule_text, "add --load FOLDER or drop --finetune")
    elif not os.path.isdir(checkpoint.load):
        fix = "give the --save folder of an earlier run, or drop --load to start fresh"
        if checkpoint.load == checkpoint.save:
            fix = "write --resume auto instead: it starts fresh where there is no checkpoint yet"
        yield Fault("--load", checkpoint.load, "there is no such folder", fix)


@rule("resume save")
def resuming_is_possible(config: PretrainConfig) -> Iterator[Fault]:
    """``--resume`` has a folder to look into."""
    if config.checkpoint.resume is not None and config.checkpoint.save is None:
        rule_text = "it continues from the --save folder, and there is none"
        yield Fault("--resume", config.checkpoint.resume, rule_text, "add --save FOLDER")


@rule("metrics_file tensorboard_dir wandb_project")
def logs_can_be_written(config: PretrainConfig) -> Iterator[Fault]:
    """Log files have a place, and the packages asked for are installed."""
    log = config.log
    if log.metrics_file is not None:
        if os.path.isdir(log.metrics_file):
            fix = f"use --metrics-file {os.path.join(log.metrics_file, 'metrics.jsonl')}"
            yield Fault("--metrics-file", log.metrics_file, "this is a folder", fix)
        else:
            yield from _writable("--metrics-file", log.metrics_file, parent=True)
    if log.tensorboard_dir is not None:
        yield from _writable("--tensorboard-dir", log.tensorboard_dir)
        yield from _installed("--tensorboard-dir", log.tensorboard_dir, "tensorboard")
    if log.wandb_project is not None:
        yield from _installed("--wandb-project", log.wandb_project, "wandb")


def _installed(flag: str, value: str, package: str) -> Iterator[Fault]:
    if importlib.util.find_spec(package) is None:
        rule_text = f"the package {package} is not installed"
        yield Fault(flag, value, rule_text, f"pip install {package}, or drop {flag}")


def _writable(flag: str, name: str, parent: bool = False) -> Iterator[Fault]:
    """Look at the nearest existing folder; nothing is created before the run starts."""
    path = Path(name).absolute()
    path = path.parent if parent else path
    # os.path.exists, because Path.exists raises where a folder may not be looked into.
    existing = next(each for each in (path, *path.parents) if os.path.exists(each))
    links = [each for each in (Path(name).absolute(), path, *path.parents) if os.path.islink(each)]
    for each in (link for link in links if not os.path.exists(link)):
        rule_text = f"{each} is a link to {os.readlink(each)}, which is not there"
        yield Fault(flag, name, rule_text, "see that its disk is there, or give another path")
        return
    fix = f"give {flag} a path inside a folder you can write to"
    if not os.path.isdir(existing):
        yield Fault(flag, name, f"{existing} is a file, not a folder", fix)
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Fault(flag, name, f"the folder {existing} cannot be written", fix)


def world_size_faults(config: PretrainConfig, world_size: int) -> Iterator[Fault]:
    """What is wrong with running this configuration on ``world_size`` processes."""
    tensor = config.parallel.tensor_model_parallel_size
    size = config.parallel.model_parallel_size
    if world_size % size:
        flag, value, what = "--tensor-model-parallel-size", tensor, "it"
        if size != tensor:
            flag, value = "--pipeline-model-parallel-size", size // tensor
            what = f"{value} pipeline stages x {tensor} tensor-parallel processes"
        rule_text = f"the number of processes, {world_size}, must be a multiple of {what}"
        fix = f"start with torchrun --nproc_per_node {multiples(world_size, size)}"
        yield Fault(flag, value, rule_text, fix)
        return
    train, replicas = config.train, world_size // size
    step = train.micro_batch_size * replicas
    batch = train.global_batch_size
    if batch is not None and batch % train.micro_batch_size == 0 and batch % step:
        yield Fault(
            "--global-batch-size",
            batch,
            f"it must be divisible by --micro-batch-size {train.micro_batch_size} x"
            f" {replicas} data-parallel replicas = {step}",
            f"use --global-batch-size {multiples(batch, step)}",
        )


def stage_faults(config: PretrainConfig, global_batch_size: int) -> Iterator[Fault]:
    """The stages of the data follow one another; a file that cannot be read is told elsewhere."""
    with contextlib.suppress(ConfigError):
        stages = read_stages(config.data)
        yield from order_faults(stages, global_batch_size, config.model.seq_length)


RUN_RULES = (
    batch_fits,
    profile_fits,
    profiler_is_asked_for,
    environment_is_deterministic,
    learning_rates_are_ordered,
    warmup_fits,
    wsd_fits,
    data_is_given,
    test_data_is_read,
    data_exists,
    mock_data_has_no_blend,
    split_is_valid,
    tokenizer_is_given,
    saving_is_possible,
    something_may_go,
    loading_is_possible,
    resuming_is_possible,
    logs_can_be_written,
)
