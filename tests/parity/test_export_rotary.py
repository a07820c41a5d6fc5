"""Rotary embeddings of exports: every kind that transformers' Llama has, in the newer and the older
form of settings, or refused."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM
from tests.llama import LIMIT, ROPES, TOKENS, llama, ours, scaled
from tests.product import random_tokens


@pytest.mark.parametrize("length", [9, 30], ids=["short", "long"])
@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_are_those_of_llama(kind, length):
    """Also beyond the trained length, where some change, and back."""
    tokens = random_tokens(40, 2, length, seed=1)
    models = [make(rope_parameters=dict(ROPES[kind])).eval() for make in (llama, ours)]
    for each in (tokens, tokens[:, :3]):
        wanted, got = (model(each).logits for model in models)
        assert (got - wanted).abs().max() <= LIMIT * wanted.abs().max()
    generate = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted, got = (model.generate(tokens[:, :9], **generate) for model in models)
    assert torch.equal(got, wanted)


OLDER_FORMS = {
    "theta": {"rope_theta": 50.0},
    "scaling": {"rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "type": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "inside": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}},
    "none": {"rope_theta": 50.0, "rope_scaling": None},
    "original": {
        "rope_parameters": scaled("yarn"),
        "original_max_position_embeddings": 8,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("form", OLDER_FORMS.values(), ids=OLDER_FORMS)
def test_the_older_form_of_rotary_settings(form, tmp_path):
    wanted = llama(**form).eval()(TOKENS).logits
    model = ours(**form)
    assert (model.eval()(TOKENS).logits - wanted).abs().max() <= LIMIT * wanted.abs().max()
    model.save_pretrained(tmp_path)
    loaded = KVShareForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


NO_ROPE = {
    "rope_type is 'mine', not one of": {"rope_parameters": scaled("mine")},
    "partial_rotary_factor is 0.5, but heads are rotated whole": {
        "rope_parameters": {**ROPES["default"], "partial_rotary_factor": 0.5}
    },
    "partial_rotary_factor is 0.25": {"partial_rotary_factor": 0.25},
    "differ between kinds of layers": {
        "rope_parameters": {"full_attention": ROPES["default"], "sliding_attention": ROPES["yarn"]}
    },
    "rope_theta is 7.0 in one place and 8.0 in another": {
        "rope_parameters": {"rope_theta": 7.0},
        "rope_theta": 8.0,
    },
    "rope_theta is 5.0 in one place and 6.0 in another": {
        "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5.0},
        "rope_theta": 6.0,
    },
    "factor is 4.0 in one place and 2.0 in another": {
        "rope_parameters": ROPES["linear"],
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "'linear' are not usable.*factor": {"rope_parameters": {"rope_type": "linear"}},
    "rope_theta is None": {"rope_parameters": {"rope_theta": None}},
    "not usable: .*size of tensor": {
        "rope_parameters": {**ROPES["longrope"], "short_factor": [1.0] * 3}
    },
}


@pytest.mark.parametrize(("text", "settings"), NO_ROPE.items(), ids=NO_ROPE)
def test_what_cannot_be_rotated_is_refused(text, settings):
    with pytest.raises(ValueError, match=text):
        ours(**settings)
