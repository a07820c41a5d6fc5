"""The naive model is itself checked: against transformers and against its own definition."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import (
    Oracle,
    RopeScaling,
    Shape,
    cyclic_groups,
    loss_and_gradients,
    random_weights,
    visible,
)

SHAPE = Shape(num_attention_heads=4, num_query_groups=2, head_width=8, window_size=4)
SIZES = {"hidden": 32, "ffn": 48, "vocabulary": 40}


@pytest.mark.parametrize(
    ("sources", "groups"),
    [
        ([0, 1, 2, 3], []),
        ([0, 0, 2, 2], []),
        ([1, 1, 3, 3], [(0, 1), (2, 3)]),
        ([0, 4, 4, 4, 4, 5], [(1, 4)]),
        ([0, 4, 4, 4, 4, 4], [(1, 4)]),
        # Layer 3 lies below the target of layer 1 and reads higher still, so the group grows.
        ([0, 4, 4, 5, 4, 5, 5], [(1, 5)]),
        ([2, 6, 2, 3, 4, 6, 6], [(0, 6)]),
    ],
)
def test_cyclic_groups_follow_the_definition(sources, groups):
    assert cyclic_groups(sources) == groups


def test_masks_spelled_out():
    strict = visible([0, 0, 0, 1, 1], strict=True, window=None)
    assert strict.int().tolist() == [
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
    ]
    window = visible([0] * 4, strict=False, window=2)
    assert window.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    "sources", [[0, 1, 2, 3], [0, 2, 2, 3], [3, 3, 3, 3], [2, 3, 2, 3], [0, 0, 3, 3]]
)
@pytest.mark.parametrize("windowed", [False, True])
def test_enough_passes_equal_token_by_token(sources, windowed):
    weights = random_weights(sources, SHAPE, **SIZES, seed=1)
    doubles = {name: w.double() for name, w in weights.items()}
    oracle = Oracle(sources, [windowed] * len(sources), SHAPE, doubles)
    tokens = torch.randint(SIZES["vocabulary"], (2, 9), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    exact = oracle.token_by_token(tokens, documents)
    torch.testing.assert_close(oracle.iterated(tokens, (8, 1), documents), exact)
    if cyclic_groups(sources):
        three = oracle.iterated(tokens, (2, 1), documents)
        torch.testing.assert_close(three[:, :3], exact[:, :3])
        assert (three[0, 3:] - exact[0, 3:]).abs().max() > 1e-4


def test_gradient_is_cut_before_the_first_pass_with_gradient():
    sources = [0, 2, 2]
    oracle = Oracle(
        sources, [False] * 3, SHAPE, random_weights(sources, SHAPE, **SIZES, tied=False)
    )
    tokens = torch.arange(10).view(1, 10)
    value = "model.layers.2.self_attn.v_proj.weight"
    _, once = loss_and_gradients(oracle, tokens, tokens, (3, 1))
    _, twice = loss_and_gradients(oracle, tokens, tokens, (2, 2))
    assert (once[value] - twice[value]).norm() > 1e-3 * twice[value].norm()


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 32)])
@pytest.mark.parametrize("tied", [True, False])
def test_standard_map_equals_transformers(scaling, tied):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling is not None:
        rope |= {"rope_type": "llama3", **vars(scaling)}
    config = transformers.LlamaConfig(
        vocab_size=SIZES["vocabulary"],
        hidden_size=SIZES["hidden"],
        intermediate_size=SIZES["ffn"],
        num_hidden_layers=3,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_query_groups,
        head_dim=SHAPE.head_width,
        rms_norm_eps=SHAPE.norm_epsilon,
        rope_parameters=rope,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    shape = Shape(num_attention_heads=4, num_query_groups=2, head_width=8, rope_scaling=scaling)
    weights = random_weights([0, 1, 2], shape, **SIZES, tied=tied)
    llama = transformers.LlamaForCausalLM(config)
    missing = llama.load_state_dict(weights, strict=False)
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    assert not missing.unexpected_keys
    llama.tie_weights()
    tokens = torch.randint(40, (2, 100), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = llama(tokens).logits
        logits = Oracle([0, 1, 2], [False] * 3, shape, weights).iterated(tokens, (0, 1))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
