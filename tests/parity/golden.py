"""Golden runs: what five steps of every map and recipe came to when it was last meant to change.

    python -m tests.parity.golden --reason "why the numbers change"

writes golden.json anew. A run is one process in fp32, started by flags and read from its metrics
and its checkpoint, so that nothing of how it is computed is fixed but the result.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_kvshare.checkpoint.parts import OPTIMIZER, RANDOM_STATE
from megatron_kvshare.checkpoint.tensors import NativeTensors
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.sharing.solver import RECIPES
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.pretrain import pretrain
from megatron_kvshare.train.report import Typed
from tests.maps import named_maps, random_maps

FILE = Path(__file__).with_name("golden.json")
STEPS = 5
FLAGS = (
    "--mock-data --vocab-size 96 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4"
    " --num-query-groups 2 --seq-length 24 --max-position-embeddings 24 --micro-batch-size 2"
    f" --global-batch-size 4 --train-iters {STEPS} --lr 1e-3 --lr-decay-style constant"
    " --adam-eps 1e-5 --eval-iters 0 --log-interval 1 --peak-tflops 1"
).split()


class Case(NamedTuple):
    """A map, in full, and how it is computed."""

    num_layers: int
    kv_map: str
    recipe: str | None

    @property
    def flags(self) -> list[str]:
        words = ["--num-layers", str(self.num_layers), "--kv-map", self.kv_map]
        words += ["--kv-recipe", self.recipe] if self.recipe else []
        return words + (["--window-size", "7"] if "s" in self.kv_map else [])


def cases() -> dict[str, Case]:
    """Every named map of four layers, windows, and random maps; cyclic ones by every recipe."""
    maps = {name: each for name, each in named_maps(4).items() if ".l" not in name or "l2" in name}
    maps |= {"mixattention": named_maps(8)["mixattention"]}
    maps |= random_maps(5, 4)
    found = {}
    for name, each in maps.items():
        for recipe in RECIPES if each.is_cyclic else (None,):
            key = f"{name}, {recipe}" if recipe else name
            found[key] = Case(each.num_layers, each.notation, recipe)
    return found


def outcome(case: Case, state: parallel.ParallelState) -> dict[str, Any]:
    """Losses, AdamW's mean gradients and the whole state after :data:`STEPS` steps.

    ``gradients``: of every weight's mean, in the order of names, its product with a vector of signs
    over the root of its size: other directions change it as well as another length.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [*FLAGS, *case.flags, "--save", folder, "--metrics-file", f"{folder}/m.jsonl"]
        planned = RunPlan.of(parse_pretrain(words), state.world_size)
        pretrain(planned, state, Typed(["kvshare", *words], ["kvshare"]))
        losses = [json.loads(line)["loss"] for line in _lines(f"{folder}/m.jsonl")]
        stored = NativeTensors(Path(folder) / f"iter_{STEPS:07d}")
        names = sorted(name for name in stored.tensors if not name.startswith(RANDOM_STATE))
        tensors = {name: stored.read(name) for name in names}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    means = {name: each for name, each in tensors.items() if ".exp_avg." in name}
    assert all(name.startswith(OPTIMIZER) for name in means) and len(means) > 10
    gradients = [float(f"{_product_with_signs(mean):.9g}") for mean in means.values()]
    return {"losses": losses, "gradients": gradients, "sha256": digest.hexdigest()}


def _product_with_signs(tensor: torch.Tensor) -> float:
    signs = torch.randint(2, tensor.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return float((tensor.double() * signs).sum() / tensor.numel() ** 0.5)


def machine() -> dict[str, str]:
    """On the same one the results are the same to the bit."""
    return {
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
    }


def _processor() -> str:
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reason", required=True, help="why the numbers change; kept in the file")
    reason = parser.parse_args().reason
    torch.set_num_threads(1)
    state = parallel.initialize()
    reasons = json.loads(FILE.read_text())["reasons"] if FILE.exists() else []
    results = {name: outcome(case, state) for name, case in cases().items()}
    parallel.destroy()
    lines = [f" {json.dumps(name)}: {json.dumps(each)}" for name, each in results.items()]
    head = {"reasons": [*reasons, reason], "machine": machine()}
    text = json.dumps(head, indent=1)[:-2] + ',\n "cases": {\n' + ",\n".join(lines) + "\n }\n}\n"
    FILE.write_text(text)


if __name__ == "__main__":
    main()
