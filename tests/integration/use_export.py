"""Uses an exported folder as its readers do, with whatever transformers is on the path, and prints
what came out as JSON: ``python use_export.py FOLDER``."""

from __future__ import annotations

import json
import sys

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    StaticCache,
)

TOKENS = torch.tensor([[7, 3, 9, 12, 5, 11, 2], [1, 1, 1, 4, 8, 6, 10]])
MASK = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])


def rounded(x: torch.Tensor) -> list:
    return [round(float(value), 4) for value in x.flatten()]


def main(folder: str) -> dict:
    load = {"trust_remote_code": True, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    inner = AutoModel.from_pretrained(folder, **load).eval()
    generate = {"attention_mask": MASK, "max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    found = {
        "logits": rounded(model(TOKENS).logits[:, -1]),
        "hidden": rounded(inner(TOKENS).last_hidden_state[:, -1]),
        "greedy": model.generate(TOKENS, **generate).tolist(),
        "beams": model.generate(TOKENS, num_beams=3, **generate).tolist(),
        "alone": model.generate(
            TOKENS[1:, 3:], **{**generate, "attention_mask": MASK[1:, 3:]}
        ).tolist(),
        "no cache": model.generate(
            TOKENS[:1], use_cache=False, **{**generate, "attention_mask": None}
        ).tolist(),
    }
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), "use_cache": False}
    found["packed"] = rounded(model(TOKENS[:1], **packed).logits[:, -1])
    found["second alone"] = rounded(model(TOKENS[:1, 4:]).logits[:, -1])
    eager = {**load, "attn_implementation": "eager"}
    plain = AutoModelForCausalLM.from_pretrained(folder, **eager).eval()
    seen = plain(TOKENS, output_hidden_states=True, output_attentions=True)
    found["states"] = [rounded(x[:, -1].sum(-1)) for x in seen.hidden_states]
    found["weights"] = [rounded(x[:, :, -1].max(-1).values) for x in seen.attentions]
    head = {**load, "num_labels": 2, "pad_token_id": 0}
    labelled = AutoModelForSequenceClassification.from_pretrained(folder, **head).eval()
    torch.nn.init.constant_(labelled.score.weight, 0.1)
    found["scores"] = rounded(labelled(TOKENS).logits)
    found["tuple"] = rounded(model(TOKENS, return_dict=False)[0][:, -1])
    scaling = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    if model.config.model_type == "kvshare":
        load["rope_parameters"] = scaling
        scaled = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
        found["yarn"] = rounded(scaled(TOKENS).logits[:, -1])
    torch.manual_seed(0)
    sampling = {**generate, "do_sample": True, "top_k": 5}
    found["sampling"] = model.generate(TOKENS, **sampling).tolist()
    if model.config.model_type != "kvshare" or not model.config.cyclic_groups:
        static = model.generate(TOKENS, cache_implementation="static", **generate).tolist()
        found["static"] = static
    else:
        try:
            cache = StaticCache(config=model.config, max_cache_len=20, max_batch_size=2)
            model(TOKENS, past_key_values=cache)
        except ValueError as error:
            found["refused"] = "DynamicCache" in str(error)
    model.train()
    model.gradient_checkpointing_enable()
    model(TOKENS, labels=TOKENS).loss.backward()
    norms = {
        name: float(x.grad.norm()) for name, x in model.named_parameters() if x.grad is not None
    }
    found["gradients"] = {name: round(norm, 4) for name, norm in norms.items()}
    return found


if __name__ == "__main__":
    print(json.dumps({"version": transformers.__version__, **main(sys.argv[1])}))
