"""Heads for other tasks over an export: what they are over Llama, loaded from its folder."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.llama import modeling_llama

from megatron_kvshare.conversion.exported import modeling_kvshare
from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import TINY, code_copied_to, write_folder
from tests.llama import LIMIT, SHAPE, TOKENS
from tests.product import random_tokens

LABELS = {
    "ForSequenceClassification": {"labels": torch.tensor([2, 0])},
    "ForTokenClassification": {"labels": TOKENS % 3},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([1, 4]),
        "end_positions": torch.tensor([3, 8]),
    },
}
AUTO = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("head", LABELS)
def test_a_head_is_that_of_llama(head, padding):
    """What padding itself gives is left out; nothing but the mask keeps it out of an answer."""
    settings = {**SHAPE, "num_labels": 3, "pad_token_id": 0, "classifier_dropout": 0.0}
    theirs = getattr(modeling_llama, f"Llama{head}")(modeling_llama.LlamaConfig(**settings))
    ours = getattr(modeling_kvshare, f"KVShare{head}")(KVShareConfig(**settings))
    weights = {name.replace("transformer.", "model."): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    if padding:
        tokens[1, -padding:] = mask[1, -padding:] = 0
    found = []
    for model in (theirs, ours):
        labels = LABELS[head]
        if head == "ForTokenClassification":
            labels = {"labels": labels["labels"].where(mask.bool(), -100)}
        output = model(tokens, attention_mask=mask, **labels)
        loss = output.loss
        if head == "ForQuestionAnswering":  # transformers' own loss counts padding among places
            places = zip(labels.values(), (output.start_logits, output.end_logits), strict=True)
            one = torch.nn.functional.cross_entropy
            loss = sum(one(x.where(mask.bool(), -1e9), place) for place, x in places)
        loss.backward()
        grads = {
            name.replace("transformer.", "model."): x.grad for name, x in model.named_parameters()
        }
        scores = output.start_logits if "start_logits" in output else output.logits
        if scores.dim() == 3:
            scores = scores * mask[..., None]
        elif "start_logits" in output:
            scores = scores * mask
        found.append({"loss": loss, "scores": scores, **grads})
    wanted, got = found
    assert set(got) == set(wanted)
    for name, x in wanted.items():
        assert (got[name] - x).abs().max() <= LIMIT * x.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("head", LABELS)
def test_a_head_is_loaded_from_an_export(head, tmp_path):
    """New weights for the head alone; saved and loaded again they are the same."""
    write_folder(tmp_path / "model", build_map(8, "sandwich-top", 3))
    tokens = random_tokens(TINY.vocabulary, 2, 9)
    with code_copied_to(tmp_path / "code"):
        load = {"trust_remote_code": True, "num_labels": 3, "pad_token_id": 0}
        model, about = AUTO[head].from_pretrained(
            tmp_path / "model", output_loading_info=True, **load
        )
        name = "qa_outputs" if head == "ForQuestionAnswering" else "score"
        assert {key.partition(".")[0] for key in about["missing_keys"]} == {name}
        wanted = model.eval()(tokens)[0]
        model.save_pretrained(tmp_path / "tuned")
        again = AUTO[head].from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
        assert torch.equal(again(tokens)[0], wanted)
