"""The configuration that DeepSpeed is given, with every value that matters written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_kvshare.config.deepspeed.agreed import Agreement, agree, all_given
from megatron_kvshare.config.deepspeed.check import Checked
from megatron_kvshare.config.deepspeed.keys import AUTO, Passed
from megatron_kvshare.config.deepspeed.table import ZERO
from megatron_kvshare.config.derive import (
    batch_layout,
    model_shape,
    recipe,
    sharing_map,
    training_plan,
)
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.costs.zero import Zero, gathers
from megatron_kvshare.errors import ConfigError


class Told(NamedTuple):
    """``config``: the settings that ``json`` agrees with; ``warnings``: one sentence each."""

    config: PretrainConfig
    json: dict[str, Any]
    warnings: tuple[str, ...]


def deepspeed_json(config: PretrainConfig, world_size: int) -> dict[str, Any]:
    """The whole configuration of ``deepspeed.initialize``; see :func:`told`."""
    return told(config, world_size).json


def told(config: PretrainConfig, world_size: int, given: Mapping[str, str] | None = None) -> Told:
    """What DeepSpeed is given; nothing is left to its defaults that changes the numbers.

    Batches count data-parallel replicas, not processes. Clipping is off, because the engine clips
    by megatron-core's norm; optimizer and schedule are the engine's too. The file is
    read here.

    ``given``: settings that the file cannot change, and where they are given; left out: all of
    them, for they have been completed by the file and are what the run is.

    Raises:
        ConfigError: with every fault of the file and every conflict with a setting.
    """
    agreement = agree(config, all_given() if given is None else given, world_size)
    if agreement.faults:
        raise ConfigError(agreement.faults)
    return Told(agreement.config, _json(agreement, world_size), agreement.warnings)


def _json(agreement: Agreement, world_size: int) -> dict[str, Any]:
    config, checked = agreement.config, agreement.checked
    batch = batch_layout(config, world_size)
    whole: dict[str, Any] = {
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    for key, value in checked.passed.items():
        if not key.startswith("zero_optimization."):
            _put(whole, key, value)
    decided = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": batch.num_microbatches,
        "gradient_clipping": 0.0,
        "bf16.enabled": config.model.bf16,
        "bf16.check_grad_overflow": False,
        "checkpoint.load_universal": config.deepspeed.universal_checkpoint,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config, checked),
    }
    for key, value in decided.items():
        _put(whole, key, value)
    return whole


def _put(whole: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        whole = whole.setdefault(section, {})
    whole[name] = value


def _zero(config: PretrainConfig, checked: Checked) -> dict[str, Any]:
    """The section of ZeRO: all that its stage heeds."""
    stage, prefix = config.deepspeed.zero_stage or 0, "zero_optimization."
    passed = checked.passed
    found: dict[str, Any] = {"stage": stage}
    for name, entry in ZERO.keys.items():
        if isinstance(entry, Passed) and stage in entry.stages:
            value = passed.get(prefix + name, AUTO if entry.default is None else entry.default)
            found[name] = _filled(name, config) if value == AUTO else value
    devices = {
        "offload_optimizer": config.deepspeed.zero_offload,
        "offload_param": passed.get(f"{prefix}offload_param.device"),
    }
    for name, device in devices.items():
        if device not in (None, "none"):
            pinned = passed.get(f"{prefix}{name}.pin_memory", True)
            found[name] = {"device": device, "pin_memory": pinned}
    return found


def zero_of(json: Mapping[str, Any]) -> Zero:
    """What of it costs memory."""
    section, usual = json["zero_optimization"], Zero(stage=0)
    return Zero(
        stage=section["stage"],
        accumulates_in_fp32=json["data_types"]["grad_accum_dtype"] == "fp32",
        reduce_bucket=section.get("reduce_bucket_size", usual.reduce_bucket),
        overlaps_reduction=section.get("overlap_comm", usual.overlaps_reduction),
        max_live=section.get("stage3_max_live_parameters", usual.max_live),
        prefetch_bucket=section.get("stage3_prefetch_bucket_size", usual.prefetch_bucket),
        offloads_optimizer="offload_optimizer" in section,
        offloads_weights="offload_param" in section,
    )


def _filled(name: str, config: PretrainConfig) -> Any:
    """For ``"auto"``: sizes by the width of the model, as transformers fills them in; else what
    DeepSpeed takes by itself."""
    hidden, stage = config.model.hidden_size, config.deepspeed.zero_stage
    usual, resident = 1_000_000_000, _resident(config)
    values = {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": 9 * hidden * hidden // 10,
        "stage3_param_persistence_threshold": 10 * hidden,
        "overlap_comm": stage == 3,
        "stage3_max_reuse_distance": max(usual, resident),
        "stage3_max_live_parameters": max(usual, resident + 9 * hidden * hidden // 10),
    }
    entry = ZERO.keys[name]
    assert isinstance(entry, Passed)
    return values.get(name, entry.default)


def _resident(config: PretrainConfig) -> int:
    """Elements of the largest cyclic group, whose layers are to stay from sweep to sweep."""
    model, sharing = config.model, config.sharing
    plan = training_plan(sharing_map(model, sharing), recipe(sharing), sharing)
    # Layers do not depend on the vocabulary.
    shape = model_shape(model, model.vocab_size or 0, sharing.window_size)
    groups = gathers(shape, plan, config.parallel.tensor_model_parallel_size)
    return max((each.elements for each in groups), default=0)
