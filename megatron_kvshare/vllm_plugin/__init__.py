"""A plugin of vLLM: ``vllm serve EXPORT`` with the KV cache of the KV layers alone.

vLLM calls :func:`register` in each of its processes. Nothing that is imported from here needs
megatron-core: torch and vLLM (with its transformers) are there, the rest of this package's
requirements may be missing.
"""

from __future__ import annotations

ARCHITECTURE = "KVShareForCausalLM"
"""As exports name themselves in ``architectures``."""


def register() -> None:
    """Make vLLM know the exports of maps with sharing or windows. Calling it again changes nothing.

    Exports of the standard map are vLLM's own Llama and need none of this.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.logger import init_logger

    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from megatron_kvshare.vllm_plugin.configuration import ServedConfig, Verify
    except ImportError as error:
        # An exception here would keep vLLM from serving any model at all.
        message = "megatron_kvshare's plugin does not fit this vLLM and serves nothing: %s"
        init_logger(f"vllm.{__name__}").warning(message, error)
        return

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = Verify
    model = "megatron_kvshare.vllm_plugin.model:KVShareForCausalLM"
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, model)
