"""``config.json`` of an export as vLLM reads it, and the refusal of what it cannot serve."""

from __future__ import annotations

from importlib.metadata import requires
from typing import Any

import vllm
from packaging.requirements import Requirement
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.vllm_plugin.rules import Engine, faults, sharing_of

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name


class ServedConfig(KVShareConfig):
    """The configuration that travels with exports, and what vLLM's Llama asks for besides."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.hidden_act = "silu"


class Verify(VerifyAndUpdateConfig):
    """What vLLM calls once all settings are known, before it starts its engine."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises :class:`ConfigError` with everything that cannot be served."""
        config = vllm_config.model_config.hf_config
        config.check()
        found = faults(config.to_dict(), sharing_of(config), _engine(vllm_config))
        if found:
            raise ConfigError(found)
        _warn_of_other_versions()


def _warn_of_other_versions() -> None:
    """The plugin leans on what vLLM promises to nobody; what setup.py names has been looked at."""
    for needed in map(Requirement, requires("megatron_kvshare") or ()):
        if needed.name == "vllm" and not needed.specifier.contains(
            vllm.__version__, prereleases=True
        ):
            logger.warning(
                "megatron_kvshare: made for vLLM %s, this is %s: compare texts with transformers'",
                needed.specifier,
                vllm.__version__,
            )


def _engine(vllm_config: VllmConfig) -> Engine:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    layers, stages = vllm_config.model_config.hf_config.num_hidden_layers, []
    for rank in range(parallel.pipeline_parallel_size):
        stages.append(range(*get_pp_indices(layers, rank, parallel.pipeline_parallel_size)))
    return Engine(
        stages=tuple(stages),
        tensor_ranks=parallel.tensor_parallel_size,
        context_ranks=parallel.decode_context_parallel_size
        * parallel.prefill_context_parallel_size,
        fast_prefill=cache.kv_sharing_fast_prefill,
        adapters=vllm_config.lora_config is not None,
        cache_dtype=cache.cache_dtype,
        unquantised_layers=tuple(cache.kv_cache_dtype_skip_layers),
        longest=vllm_config.model_config.max_model_len,
    )
