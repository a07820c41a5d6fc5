"""A small Llama of transformers, and the exported model with the same settings and weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM
from tests.product import random_tokens

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "initializer_range": 0.2,
    "eos_token_id": None,
}
TOKENS = random_tokens(40, 2, 9, seed=0)
LIMIT = 1e-5


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings}))


def ours(**settings: Any) -> KVShareForCausalLM:
    torch.manual_seed(0)
    return KVShareForCausalLM(KVShareConfig(**{**SHAPE, **settings}))


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **more}


ORIGINAL = {"original_max_position_embeddings": 8}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 50.0},
    "linear": scaled("linear"),
    "dynamic": scaled("dynamic"),
    "yarn": scaled("yarn", **ORIGINAL),
    "yarn-mscale": scaled("yarn", mscale=0.7, mscale_all_dim=0.3, beta_fast=16, **ORIGINAL),
    "yarn-attention": scaled("yarn", attention_factor=1.7, truncate=False, **ORIGINAL),
    "longrope": scaled("longrope", short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[2.0] * 4)
    | ORIGINAL,
    "llama3": scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    "proportional": scaled("proportional", partial_rotary_factor=0.5),
}
