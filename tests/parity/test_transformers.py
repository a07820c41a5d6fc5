"""The standard map is exactly the Llama of transformers, with weights of the same names."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.sharing.patterns import build_map
from tests.product import Tiny, assert_close_by_name, load_by_name, random_tokens

LAYERS, LENGTH = 4, 24
TOLERANCE = 1e-5
VARIANTS = {
    "gqa": Tiny(),
    "mha-untied": Tiny(kv_heads=4, untied=True),
    "mqa": Tiny(kv_heads=1),
    "wide-heads": Tiny(extra={"kv_channels": 12, "rotary_base": 500000.0}),
    "rope-scaling": Tiny(extra={"use_rope_scaling": True, "rope_original_max_positions": 8}),
}


def llama(tiny: Tiny):
    """A LlamaForCausalLM of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny.config(LAYERS)
    rope: dict = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.use_rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_max_positions,
        }
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
            max_position_embeddings=64,
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
    reference = llama(tiny)
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
