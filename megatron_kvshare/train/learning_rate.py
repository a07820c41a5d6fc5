"""The learning rate where a run goes on with other flags: it must not jump unseen."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_kvshare.config import PretrainConfig, TrainConfig
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.megatron_api.optimizer import learning_rate

_SHAPE = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
)


def schedule_change(stored: Mapping[str, Any], train: TrainConfig, step: int) -> str | None:
    """What becomes of the learning rate after ``step``, if it is not what the checkpoint's schedule
    has there; None if it is. ``stored``: the settings in the checkpoint's manifest.
    """
    known = {name: stored[name] for name in (*_SHAPE, "train_iters") if name in stored}
    before = replace(train, **known)
    planned, now = learning_rate(before, step + 1), learning_rate(train, step + 1)
    if math.isclose(planned, now, rel_tol=1e-6, abs_tol=1e-12 * train.lr):
        return None
    changed = [
        f"{flag_of(name)} was {_shown(value)}, now {_shown(getattr(train, name))}"
        for name, value in known.items()
        if value != getattr(train, name)
    ]
    return (
        f"the learning rate goes from {learning_rate(before, step):.4g} in step {step:,} to"
        f" {now:.4g} in step {step + 1:,}, where the checkpoint's schedule has {planned:.4g}"
        f" ({'; '.join(changed)}). {_way_out(before, train, planned)}"
    )


def _way_out(before: TrainConfig, train: TrainConfig, planned: float) -> str:
    if planned == 0:
        return (
            "That schedule has ended at 0. A new one with its own warm-up starts by --finetune"
            " --load with another --save."
        )
    # The end of the decay follows --train-iters unless it is named.
    wanted = replace(before, lr_decay_iters=before.decay_iters)
    given = {name: getattr(wanted, name) for name in _SHAPE}
    flags = [
        f"{flag_of(name)} {value}" if value is not None else f"no {flag_of(name)}"
        for name, value in given.items()
        if value != getattr(train, name)
    ]
    return f"To go on with that schedule, give {', '.join(flags)}."


def _shown(value: object) -> str:
    return "left out" if value is None else str(value)


def commands_to_train_on(config: PretrainConfig, words: Sequence[str]) -> list[str]:
    """How to train up to twice as long as ``config``, which was started by ``words``, without a
    jump of the learning rate: the command, after a line that says why if it begins anew.
    """
    train = config.train
    planned = learning_rate(train, train.train_iters + 1)
    if planned == 0:
        reason = (
            "  The learning rate has ended at 0. What trains on is a new schedule with a warm-up of"
            " its own,\n  from these weights, which reads the data from the start:"
        )
        return [reason, f"  train on:      {shlex.join(_anew(config, words))}"]
    longer = replace(train, train_iters=2 * train.train_iters)
    if not math.isclose(learning_rate(longer, train.train_iters + 1), planned):
        longer = replace(longer, lr_decay_iters=train.decay_iters)
    if learning_rate(longer, longer.train_iters) == 0:
        longer = replace(longer, train_iters=longer.decay_iters)
    again = [*without(words, "--train-iters", "--resume"), "--resume", "auto"]
    again += ["--train-iters", str(longer.train_iters)]
    if longer.lr_decay_iters != train.lr_decay_iters:
        again = [*without(again, "--lr-decay-iters"), "--lr-decay-iters", str(train.decay_iters)]
    return [f"  train on:      {shlex.join(again)}"]


def _anew(config: PretrainConfig, words: Sequence[str]) -> list[str]:
    checkpoint, log = config.checkpoint, config.log
    folder = checkpoint.save or ""
    changed = {"--load": folder, "--save": f"{folder.rstrip('/')}-longer"}
    if log.metrics_file is not None:
        file = Path(log.metrics_file)
        changed["--metrics-file"] = str(file.with_name(f"{file.stem}-longer{file.suffix}"))
    if log.tensorboard_dir is not None:
        changed["--tensorboard-dir"] = f"{log.tensorboard_dir.rstrip('/')}-longer"
    changed |= _warm_up(config.train)
    anew = without(words, *changed, "--resume")
    if not checkpoint.finetune:
        anew.append("--finetune")
    return [*anew, *(word for pair in changed.items() for word in pair)]


def _warm_up(train: TrainConfig) -> dict[str, str]:
    """Flags of a short warm-up for settings that have none, as far as the decay leaves room."""
    room = train.decay_iters - (train.lr_wsd_decay_iters or 1)
    steps = min(max(train.decay_iters // 100, 1), room)
    if train.warmup_iters or steps <= 0:
        return {}
    if train.lr_warmup_fraction is None:
        return {"--lr-warmup-iters": str(steps)}
    return {"--lr-warmup-fraction": f"{(steps + 0.5) / train.decay_iters:.6f}"}


def without(command: Sequence[str], *flags: str) -> list[str]:
    """``command`` without these flags and the one value after each."""
    kept, value_follows = [], False
    for word in command:
        if not value_follows and not word.startswith(tuple(f"{flag}=" for flag in flags)):
            kept += [] if word in flags else [word]
        value_follows = word in flags
    return kept
