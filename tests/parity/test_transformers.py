"""The standard map is exactly the Llama of transformers, with weights of the same names."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.sharing.patterns import build_map
from tests.product import Tiny, assert_close_by_name, load_by_name, random_tokens

LAYERS, LENGTH = 4, 24
TOLERANCE = 1e-5
MSCALE = {"yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.3}
EXACT = {"yarn_attention_factor": 1.7, "yarn_correction_range_round_to_int": False}


def stretched(kind: str, **more: float) -> Tiny:
    return Tiny(extra={"rope_scaling_type": kind, "rope_scaling_factor": 4.0, **more})


VARIANTS = {
    "gqa": Tiny(),
    "mha-untied": Tiny(kv_heads=4, untied=True),
    "mqa": Tiny(kv_heads=1),
    "wide-heads": Tiny(extra={"kv_channels": 12, "rotary_base": 500000.0}),
    "rope-scaling": Tiny(extra={"use_rope_scaling": True, "rope_original_max_positions": 8}),
    "linear": stretched("linear"),
    "dynamic": stretched("dynamic", max_position_embeddings=16),
    "yarn": stretched("yarn", rope_original_max_positions=8),
    "yarn-mscale": stretched("yarn", rope_original_max_positions=8, yarn_beta_fast=9, **MSCALE),
    "yarn-scale": stretched("yarn", rope_original_max_positions=8, **EXACT),
}
ROPES = {
    "rope-scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 9.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
    },
    "yarn-scale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "attention_factor": 1.7,
        "truncate": False,
    },
}
"""The same in transformers' words."""


def llama(tiny: Tiny, rope: dict):
    """A LlamaForCausalLM of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny.config(LAYERS)
    rope = {"rope_type": "default", "rope_theta": config.rotary_base, **rope}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tiny.vocabulary,
            hidden_size=tiny.hidden,
            intermediate_size=tiny.ffn,
            num_hidden_layers=LAYERS,
            num_attention_heads=tiny.heads,
            num_key_value_heads=tiny.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters=rope,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=not tiny.untied,
        )
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal(variant, single):
    from tests.product import loss_and_gradients

    pytest.importorskip("transformers")
    tiny = VARIANTS[variant]
    sharing = build_map(LAYERS, "standard")
    weights = tiny.weights(sharing)
    reference = llama(tiny, ROPES.get(variant, {}))
    reference.load_state_dict(weights, strict=False)
    reference.tie_weights()
    model = tiny.model(sharing, single)
    load_by_name(model, weights)
    tokens, labels = (random_tokens(tiny.vocabulary, 2, LENGTH, seed) for seed in (0, 1))

    expected = reference(tokens).logits
    with torch.no_grad():
        got = model(tokens).value[..., : tiny.vocabulary]
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    _, gradients = loss_and_gradients(model, single, tokens, labels)
    assert_close_by_name(
        gradients, {name: p.grad for name, p in reference.named_parameters()}, TOLERANCE
    )
