"""Whatever layout saved it, one process exports the same bytes: those of the weights by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_kvshare.checkpoint.reader import open_checkpoint
from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.conversion.export import ExportJob, export
from megatron_kvshare.model.parameters import gather_by_name
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train import saving, setup
from megatron_kvshare.train.step import train_step
from tests.distributed.jobs import Case, stages
from tests.distributed.world import Layout, World

CASES = {
    "sandwich-top": Case(
        sharing={"kv_pattern": "sandwich-top", "kv_layers": 3, "kv_recipe": "two-sweep"}
    ),
    "bottom-untied": Case(
        sharing={"kv_pattern": "pizza-bottom", "kv_layers": 3},
        model={"untie_embeddings_and_output_weights": True},
    ),
}
LAYOUTS = [
    Layout(tensor=2),
    Layout(tensor=4, sequence_parallel=True),
    Layout(pipeline=2),
    Layout(tensor=2, pipeline=2, virtual=2),
]


def save(state, layout: Layout, case: Case, folder: str, steps: int):
    """Train ``steps`` and save; returns the weights by name."""
    config = replace(case.config(layout), checkpoint=CheckpointConfig(save=folder))
    run = setup.prepare(RunPlan.of(config, state.world_size), state)
    batches = run.data.train_batches(0)
    for step in range(steps):
        train_step(run, batches, step)
    saving.save(run, last=True)
    return gather_by_name(stages(run), state)


def exported(root: Path, single) -> dict[str, bytes]:
    """The weight files of an export, proven."""
    stored, target = open_checkpoint(root / "checkpoint"), root / "hf"
    job = ExportJob(save=target, max_shard_bytes=100_000)
    assert export(stored, job, single).difference is not None
    return {path.name: path.read_bytes() for path in target.glob("model*")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_layout_exports_the_same_bytes(case, world: World, single, tmp_path):
    files = {}
    for layout in (Layout(), *LAYOUTS):
        root = tmp_path / str(layout)
        world.run(save, layout, case, str(root / "checkpoint"), 0)
        files[str(layout)] = exported(root, single)
    first = files.pop(str(Layout()))
    assert len(first) > 2
    for layout, each in files.items():
        assert each == first, layout


def test_trained_weights_are_exported_bit_by_bit(world: World, single, tmp_path):
    layout = Layout(tensor=2, pipeline=2)
    case = CASES["sandwich-top"]
    weights = world.run(save, layout, case, str(tmp_path / "checkpoint"), 2)[0]
    exported(tmp_path, single)
    found: dict = {}
    for shard in (tmp_path / "hf").glob("*.safetensors"):
        found |= load_file(shard)
    assert found.keys() == weights.keys()
    assert all((found[name] == weights[name]).all() for name in weights)
