"""What DeepSpeed's file says of settings that have a flag too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_kvshare.config.deepspeed.check import Checked
from megatron_kvshare.config.deepspeed.keys import AUTO

TYPE, BETAS = "scheduler.type", "optimizer.params.betas"
DEVICE, PARAMETERS = "zero_optimization.offload_optimizer.device", "data_types.param_dtype"
RATIO = "scheduler.params.cos_min_ratio"
ACCUMULATION = "gradient_accumulation_steps"
_DECAYS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_ALIKE = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "bf16.enabled": "bf16",
    "gradient_clipping": "clip_grad",
    "zero_optimization.stage": "zero_stage",
    "checkpoint.load_universal": "universal_checkpoint",
    "vocabulary_size": "vocab_size",
    "optimizer.params.lr": "lr",
    "optimizer.params.eps": "adam_eps",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "lr",
    "scheduler.params.total_num_steps": "lr_decay_iters",
    "scheduler.params.warmup_num_steps": "lr_warmup_iters",
}
"""Keys whose values are those of a setting."""


class Said(NamedTuple):
    """The ``value`` of a setting by its ``name``, and as the file has ``written`` it; of
    :data:`RATIO` as a part of the learning rate."""

    key: str
    written: Any
    name: str
    value: Any


def said(checked: Checked) -> Iterator[Said]:
    """In an order in which later ones may need earlier ones; ``"auto"`` says nothing."""
    given = {key: value for key, value in checked.agreed.items() if value != AUTO}
    for key, name in _ALIKE.items():
        if key in given:
            yield Said(key, given[key], name, given[key])
    for place, beta in enumerate(given.get(BETAS, ())):
        yield Said(BETAS, given[BETAS], f"adam_beta{place + 1}", beta)
    if TYPE in given:
        yield Said(TYPE, given[TYPE], "lr_decay_style", _DECAYS[given[TYPE]])
    if given.get(TYPE) == "WarmupDecayLR":
        yield Said(TYPE, given[TYPE], "min_lr", 0.0)
    if RATIO in given:
        yield Said(RATIO, given[RATIO], "min_lr", given[RATIO])
    if DEVICE in given:
        yield Said(DEVICE, given[DEVICE], "zero_offload", _offload(given[DEVICE]))
    if PARAMETERS in given:
        yield Said(PARAMETERS, given[PARAMETERS], "bf16", given[PARAMETERS] == "bf16")


def _offload(device: str) -> str | None:
    return None if device == "none" else device


def close(value: Any, other: Any) -> bool:
    """Whether two values of a setting are the same, products of decimal fractions included."""
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-12)
    return bool(value == other)
