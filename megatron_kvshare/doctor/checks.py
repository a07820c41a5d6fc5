"""What ``kvshare doctor`` looks at: each finding names a next step."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SETUP = "bash tools/setup_env.sh"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``state`` is ok, missing, wrong or note."""

    section: str
    name: str
    state: str
    found: str
    detail: str
    next_step: str = ""
    required: bool = False

    @property
    def stops_work(self) -> bool:
        """True when nothing can be trained before this is put right."""
        return self.required and self.state in ("missing", "wrong")


class Package(NamedTuple):
    """A distribution, the versions that work (``below`` excluded) and what it brings."""

    name: str
    at_least: str
    below: str
    brings: str


REQUIRED = (
    Package("torch", "2.7", "", "tensors, autograd, NCCL and gloo"),
    Package("megatron-core", "0.16.1", "0.20", "parallel layers, optimizer, datasets, checkpoints"),
    Package("sentencepiece", "0.2.3", "", "the default tokenizer"),
    Package("datasets", "", "", "Parquet, Arrow and data sets for kvshare preprocess, evaluation sets"),
    Package("pydantic", "2.7", "", "checked configuration"),
    Package("PyYAML", "", "", "--config FILE.yaml"),
    Package("rich", "", "", "the drawings of kvshare plan"),
    Package("numpy", "", "", "indexed data"),
    Package("safetensors", "", "", "weights in Hugging Face's format"),
)
OPTIONAL = {
    "deepspeed": (Package("deepspeed", "0.19.8", "", "--engine deepspeed (ZeRO)"),),
    "hf": (
        Package("transformers", "4.57", "", "conversions and their proof, Hugging Face tokenizers"),
        Package("tokenizers", "", "", "fast Hugging Face tokenizers"),
        Package("huggingface_hub", "", "", "cutting exports into files"),
        Package("protobuf", "", "", "SentencePiece models as Hugging Face tokenizers"),
        Package("networkx", "", "", "matching heads (--kv-init aligned)"),
    ),
    "eval": (
        Package("lm_eval", "0.4.13", "", "kvshare evaluate --tasks"),
        Package("accelerate", "", "", "lm-eval's way to load models"),
    ),
    "serve": (
        Package("fastapi", "0.165", "", "kvshare serve: requests and their checks"),
        Package("uvicorn", "0.54", "", "kvshare serve: connections"),
        Package("prometheus_client", "0.26", "", "kvshare serve: /metrics"),
    ),
    "tracking": (
        Package("wandb", "0.22.3", "", "--wandb-project (works offline)"),
        Package("tensorboard", "", "", "--tensorboard-dir"),
    ),
    "test": (
        Package("pytest", "", "", "the test suite"),
        Package("pytest-xdist", "", "", "tests in parallel"),
        Package("hypothesis", "", "", "property tests"),
        Package("ruff", "", "", "format and lint"),
        Package("mypy", "", "", "type checks"),
        Package("types-PyYAML", "", "", "type checks"),
        Package("matplotlib", "", "", "curves of benchmark runs"),
        Package("psutil", "", "", "tests that end processes of a job"),
        Package("httpx2", "", "", "tests of kvshare serve"),
    ),
}


def installed_version(name: str) -> str | None:
    """The version of a distribution, or None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The comparable part of a version: ``2.13.0+cpu`` is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def supported(package: Package, version: str) -> bool:
    """True when ``version`` lies in the package's range."""
    mine = release(version)
    too_old = bool(package.at_least) and mine < release(package.at_least)
    too_new = bool(package.below) and mine >= release(package.below)
    return not (too_old or too_new)


def check_package(package: Package, section: str, extra: str = "") -> Finding:
    """One distribution: there, missing or of a version that is not supported."""
    version = installed_version(package.name)
    bounds = [f">={package.at_least}"] if package.at_least else []
    bounds += [f"<{package.below}"] if package.below else []
    wanted = f" (supported: {', '.join(bounds)})" if bounds else ""
    state = "missing" if version is None else "ok" if supported(package, version) else "wrong"
    step = SETUP if not extra else f"{SETUP}, or pip install -c constraints.txt -e '.[{extra}]'"
    return Finding(
        section=section,
        name=package.name,
        state=state,
        found=version or "",
        detail=package.brings + wanted,
        next_step="" if state == "ok" else step,
        required=not extra,
    )


def check_python() -> Finding:
    """Python itself; megatron-core 0.16.1 is the newest for 3.11, 0.17 and later need 3.12."""
    version = platform.python_version()
    good = release(version) >= (3, 11)
    return Finding(
        section="required",
        name="Python",
        state="ok" if good else "wrong",
        found=version,
        detail="supported: >=3.11; tested: 3.11 with megatron-core 0.16.1, 3.12 with 0.19.2",
        next_step="" if good else f"PYTHON=python3.12 {SETUP}",
        required=True,
    )


def check_packages() -> Iterator[Finding]:
    """Everything setup.py names: the core, then each extra."""
    for package in REQUIRED:
        yield check_package(package, "required")
    for extra, packages in OPTIONAL.items():
        for package in packages:
            yield check_package(package, f"extra {extra}", extra)


def check_cpu() -> Iterator[Finding]:
    """The CPU backend, by switching it on, and whether a compiler will ever be needed."""
    from megatron_kvshare.megatron_api import probe

    fault = probe.cpu_backend_fault()
    yield Finding(
        section="devices",
        name="CPU backend",
        state="wrong" if fault else "ok",
        found=fault or f"gloo, {os.cpu_count()} cores",
        detail="the whole of training runs without a GPU, for small models and tests",
        next_step=SETUP if fault else "",
        required=True,
    )
    compiled = probe.dataset_helpers_compiled()
    yield Finding(
        section="devices",
        name="compiler",
        state="ok" if compiled else "wrong",
        found="not needed" if compiled else "needed: no compiled dataset helpers",
        detail="megatron-core's wheel brings its dataset helpers compiled",
        next_step="" if compiled else f"install megatron-core from its wheel: {SETUP}",
    )


def check_gpus() -> Finding:
    """The GPUs torch can use, or why there are none."""
    brings = "training at full size with NCCL, bf16 and flash attention (torch SDPA)"
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [torch.cuda.get_device_name(index) for index in range(count)]
        build = torch.version.cuda
    except Exception as error:  # a broken torch is reported by its own finding
        return Finding("devices", "GPUs", "missing", f"torch does not load: {error}", brings, SETUP)
    if count:
        found = f"{count} x {', '.join(sorted(set(names)))}, CUDA {build}"
        return Finding("devices", "GPUs", "ok", found, brings)
    if not shutil.which("nvidia-smi"):
        step = "nothing to do for small runs; on a GPU machine install NVIDIA's driver"
        return Finding("devices", "GPUs", "note", "none on this machine", brings, step)
    if build is None:
        step = f"TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 VENV=.venv-cuda {SETUP}"
        return Finding(
            "devices", "GPUs", "wrong", "a driver, but torch is a CPU build", brings, step
        )
    step = (
        "see what `nvidia-smi` and CUDA_VISIBLE_DEVICES say, and whether the driver is new enough"
    )
    return Finding(
        "devices", "GPUs", "wrong", f"a driver, but torch (CUDA {build}) sees none", brings, step
    )


COMPILE_SECONDS = 120
_TINY_KERNEL = """
import torch
x = torch.arange(256.0, device="cuda")
assert torch.equal(torch.compile(lambda x: x * 2 + 1)(x), x * 2 + 1)
"""


def check_compilation() -> Finding | None:
    """Whether a GPU's fused kernels can be compiled: by compiling one, in a process of its own that
    may hang or die. None without a GPU: nothing is compiled there."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None
        from megatron_kvshare.kernels.compiling import compile_fault

        fault = compile_fault() or _fault_of_process(_TINY_KERNEL, COMPILE_SECONDS)
    except Exception:  # a broken torch is reported by its own finding
        return None
    return Finding(
        section="devices",
        name="torch.compile",
        state="wrong" if fault else "ok",
        found=fault or "a kernel was compiled and run",
        detail="--compile: fused norms, SwiGLU, rotation and attention of token subsets",
        next_step="install a C compiler, Python's headers and the Triton that belongs to torch, or"
        " do without: plain kernels run then, slower"
        if fault
        else "",
    )


def _fault_of_process(program: str, seconds: float) -> str | None:
    """What a Python program fails with, in its last line; None where it ends well."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"a tiny kernel was not compiled in {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def package_folders(name: str) -> list[Path]:
    """Where a top-level package lies, without importing it; empty when it is not there."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def check_apex() -> Finding:
    """NVIDIA apex is optional; the distribution called ``apex`` on PyPI is something else."""
    brings = "NVIDIA apex: fused AdamW on GPUs; torch's own AdamW is used without it"
    folders = package_folders("apex")
    if not folders:
        step = "optional, and not `pip install apex`: build it from github.com/NVIDIA/apex"
        return Finding("GPU extras", "apex", "note", "not installed", brings, step)
    if any((folder / "optimizers").is_dir() for folder in folders):
        return Finding("GPU extras", "apex", "ok", installed_version("apex") or "found", brings)
    found = f"{installed_version('apex') or 'found'}: PyPI's unrelated web toolkit, not NVIDIA's"
    return Finding("GPU extras", "apex", "wrong", found, brings, "pip uninstall apex")


def check_gpu_extras() -> Iterator[Finding]:
    """Libraries that only pay on GPUs and are found at run time."""
    engine = "transformer_engine"
    version = installed_version("transformer-engine") or installed_version(
        "transformer_engine_torch"
    )
    there = bool(package_folders(engine))
    yield Finding(
        section="GPU extras",
        name="Transformer Engine",
        state="ok" if there else "note",
        found=(version or "found") if there else "not installed",
        detail="attention and layers for --transformer-impl transformer_engine",
        next_step=""
        if there
        else "optional: pip install --no-build-isolation 'transformer-engine[pytorch]'",
    )
    flash = bool(package_folders("flash_attn"))
    yield Finding(
        section="GPU extras",
        name="flash-attn",
        state="ok" if flash else "note",
        found=(installed_version("flash-attn") or "found") if flash else "not installed",
        detail="not needed: torch SDPA brings flash attention",
    )
    yield check_apex()


def all_findings() -> list[Finding]:
    """Run every check, in the order of the report."""
    compilation = check_compilation()
    return [
        check_python(),
        *check_packages(),
        *check_cpu(),
        check_gpus(),
        *([] if compilation is None else [compilation]),
        *check_gpu_extras(),
    ]
