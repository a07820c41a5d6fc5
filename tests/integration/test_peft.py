"""PEFT fine-tunes an export: adapters get gradients through shared keys and values, merging them
changes nothing."""

from __future__ import annotations

import json

import pytest

from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import write_folder
from tests.integration import side_packages

pytestmark = [pytest.mark.nightly, pytest.mark.download]
CODE = """\
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
model.gradient_checkpointing_enable()
tokens = torch.randint(40, (2, 11))
optimizer = torch.optim.SGD(model.parameters(), 1.0)
losses = []
for _ in range(5):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    trained = [name for name, x in model.named_parameters() if x.grad is not None]
    model.zero_grad()
    losses.append(float(loss))
model.eval()
tuned = model(input_ids=tokens).logits
written = model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
merged = model.merge_and_unload()
difference = float((merged(tokens).logits - tuned).abs().max())
same = written.equal(merged.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0))
print(json.dumps({"losses": losses, "trained": trained, "difference": difference, "same": same}))
"""


@pytest.mark.parametrize("recipe", ["paper", "two-sweep"])
def test_lora(recipe, tmp_path):
    packages = side_packages.install("peft", "peft==0.21.2", "accelerate==1.15.0")
    folder = write_folder(tmp_path / "hf", build_map(8, "sandwich-top", 3), RECIPES[recipe])
    found = json.loads(side_packages.run(packages, "-c", CODE, folder).splitlines()[-1])
    assert found["losses"][-1] < found["losses"][0] - 0.1
    assert all("lora" in name for name in found["trained"])
    assert any("layers.6.self_attn.k_proj" in name for name in found["trained"])
    assert found["difference"] < 1e-4 and found["same"]
