"""transformers' Trainer fine-tunes an export of the standard map as it does Llama, with packed
documents, accumulated gradients and smoothed labels, and a cyclic map with packed documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_kvshare.conversion import export
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import write_folder
from tests.integration import side_packages

pytestmark = [pytest.mark.nightly, pytest.mark.download]
CODE = """\
import json, sys, torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer
from transformers import TrainingArguments, default_data_collator

draw = torch.Generator().manual_seed(0)
texts = [torch.randint(40, (n,), generator=draw).tolist() for n in (9, 4, 7, 12, 5, 8, 3, 11)]
packed = [{"input_ids": each} for each in texts]
padded = [
    {
        "input_ids": each + [0] * (12 - len(each)),
        "labels": each + [-100] * (12 - len(each)),
        "attention_mask": [1] * len(each) + [0] * (12 - len(each)),
    }
    for each in texts
]
WAYS = {
    "packed": (packed, DataCollatorWithFlattening(return_flash_attn_kwargs=True), {}),
    "padded": (padded, default_data_collator, {}),
    "accumulated": (padded, default_data_collator, {"gradient_accumulation_steps": 2}),
    "smoothed": (padded, default_data_collator, {"label_smoothing_factor": 0.1}),
    "checkpointed": (packed, DataCollatorWithFlattening(), {"gradient_checkpointing": True}),
}
found = {}
for name, (data, collator, settings) in WAYS.items():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    arguments = TrainingArguments(
        output_dir=sys.argv[2], per_device_train_batch_size=2, max_steps=4, logging_steps=1,
        learning_rate=0.05, lr_scheduler_type="constant", optim="sgd", report_to=[],
        save_strategy="no", use_cpu=True, seed=1, remove_unused_columns=False, **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    steps = [step for step in trainer.state.log_history if "loss" in step]
    found[name] = [[step["loss"], step["grad_norm"]] for step in steps]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def packages() -> Path:
    return side_packages.install("trainer", "accelerate==1.15.0")


def trained(packages: Path, folder: Path) -> dict[str, list[list[float]]]:
    return json.loads(
        side_packages.run(packages, "-c", CODE, folder, folder.parent / "out").splitlines()[-1]
    )


def test_the_standard_map_is_trained_as_llama(packages, tmp_path):
    sharing = build_map(4, "standard")
    llama = write_folder(tmp_path / "llama", sharing)
    ours = write_folder(tmp_path / "ours", build_map(4, "cla:2"))
    shutil.copyfile(llama / "model.safetensors", ours / "model.safetensors")
    content = json.loads((ours / "config.json").read_text())
    content["kv_source_layers"] = list(sharing.sources)
    (ours / "config.json").write_text(json.dumps(content))
    assert (ours / export.CODE[0]).is_file()
    wanted, got = trained(packages, llama), trained(packages, ours)
    for name, steps in wanted.items():
        assert len(steps) == 4
        for mine, theirs in zip(got[name], steps, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-4), name


def test_a_cyclic_map_learns_from_packed_documents(packages, tmp_path):
    top = write_folder(tmp_path / "top", build_map(8, "sandwich-top", 3), RECIPES["two-sweep"])
    found = trained(packages, top)
    for plain, checkpointed in zip(found["packed"], found["checkpointed"], strict=True):
        assert plain == pytest.approx(checkpointed, rel=1e-4)
    assert found["packed"][-1][0] < found["packed"][0][0]
