"""The configuration that DeepSpeed is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_kvshare.config.derive import batch_layout
from megatron_kvshare.config.fields.pretrain import PretrainConfig


def deepspeed_json(config: PretrainConfig, world_size: int) -> dict[str, Any]:
    """The whole configuration of ``deepspeed.initialize``; nothing is left to its defaults that
    changes the numbers.

    Batches count data-parallel replicas, not processes. Clipping is off: the engine clips, by
    megatron-core's norm.

    Raises:
        ConfigError: with every fault of the file and every conflict with a setting.
    """
    batch, settings = batch_layout(config, world_size), config.deepspeed
    given: dict[str, Any] = {}
    if settings.deepspeed_config is not None:
        given = json.loads(Path(settings.deepspeed_config).read_text(encoding="utf-8"))
    zero = {"stage": 0, **given.get("zero_optimization", {})}
    if settings.zero_stage is not None:
        zero["stage"] = settings.zero_stage
    if settings.zero_offload is not None:
        zero["offload_optimizer"] = {"device": settings.zero_offload}
    return {
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        **given,
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": batch.num_microbatches,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": config.model.bf16, "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
