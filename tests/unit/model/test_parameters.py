"""The parameter map: names, shapes, initial weights."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_kvshare.model.parameters import gather_by_name, initialize, parameter_pieces
from megatron_kvshare.sharing.patterns import build_map
from tests.maps import named_maps
from tests.product import Tiny, load_by_name


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("sharing", named_maps(4).values(), ids=named_maps(4))
def test_names_and_shapes_are_those_of_llama_without_consumers_keys(sharing, untied, single):
    """The naive model's weights, which know nothing of the product, fit exactly and come back."""
    tiny = Tiny(untied=untied)
    weights = tiny.weights(sharing)
    model = tiny.model(sharing, single)
    load_by_name(model, weights)
    back = gather_by_name([model], single, "weight")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    true_size = sum(weight.numel() for weight in weights.values())
    padding = (48 - tiny.vocabulary) * tiny.hidden * (2 if untied else 1)
    assert sum(p.numel() for p in model.parameters()) == true_size + padding


def test_every_element_of_a_parameter_belongs_to_one_piece(single):
    model = Tiny(vocabulary=48, untied=True).model(build_map(8, "sandwich-top", 3), single)
    parameters = dict(model.named_parameters())
    for name, pieces in parameter_pieces(model).items():
        count = torch.zeros_like(parameters[name])
        for piece in pieces:
            piece.of_local(count).add_(1)
        assert (count == 1).all(), name


def initial(tiny: Tiny, single, seed: int = 1, pattern: str = "standard", kv_layers=None) -> dict:
    model = tiny.model(build_map(8, pattern, kv_layers), single)
    initialize(model, seed)
    return gather_by_name([model], single, "weight")


def test_initial_weights_have_the_configured_spread(single):
    tiny = Tiny(hidden=64, ffn=96, vocabulary=101, untied=True)
    for name, weight in initial(tiny, single).items():
        if weight.dim() == 1:
            assert (weight == 1).all()
            continue
        onto_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(16) if onto_residual else 0.02
        assert abs(weight.mean()) < 5 * std / math.sqrt(weight.numel())
        assert weight.std() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))


def test_initial_weights_depend_on_seed_name_and_shape_only(single):
    tiny = Tiny(vocabulary=33)
    reference = initial(tiny, single)
    assert any(not torch.equal(reference[n], w) for n, w in initial(tiny, single, seed=2).items())
    others = [
        initial(tiny.but(extra={"make_vocab_size_divisible_by": 128}), single),
        initial(tiny, single, pattern="sandwich-top", kv_layers=3),
        initial(tiny.but(untied=True), single),
    ]
    for other in others:
        common = reference.keys() & other.keys()
        assert len(common) > 60
        assert all(torch.equal(reference[name], other[name]) for name in common)
    matrices = [w for w in reference.values() if w.shape == (32, 32)]
    assert not any(torch.equal(a, b) for a in matrices for b in matrices if a is not b)


def test_padded_rows_are_zero_and_get_no_gradient(single):
    tiny = Tiny(vocabulary=33, untied=True, extra={"make_vocab_size_divisible_by": 64})
    model = tiny.model(build_map(4, "standard"), single)
    initialize(model, 1)
    tokens = torch.arange(20).view(1, 20)
    model(tokens, tokens).loss.backward()
    for parameter in (model.embedding.weight, model.output_layer.weight):
        assert parameter.shape[0] == 64
        assert (parameter[33:] == 0).all()
        assert (parameter.grad[33:] == 0).all()
    logits = model(tokens).value
    assert (logits[..., 33:] == float("-inf")).all()
