"""The table of tensors counts what tensor- and pipeline-parallel ranks really hold."""

from __future__ import annotations

import pytest

from megatron_kvshare.costs.weights import stage_parameters
from tests.distributed import jobs
from tests.distributed.jobs import Case
from tests.distributed.world import Layout, World

VOCABULARY, HIDDEN = 101, 64


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("layout", "kv_heads"),
    [
        (Layout(tensor=2), 4),
        (Layout(tensor=4), 2),
        (Layout(tensor=2, pipeline=2), 8),
        (Layout(pipeline=2, virtual=2), 2),
    ],
    ids=str,
)
def test_ranks_hold_what_the_table_says(layout: Layout, kv_heads: int, untied: bool, world: World):
    """All ranks of a stage together: norms on each of them, the vocabulary padded, the rest cut."""
    sharing = {"kv_pattern": "sandwich-top", "kv_layers": 3}
    model = {"untie_embeddings_and_output_weights": untied}
    case = Case(sharing=sharing, kv_heads=kv_heads, model=model)
    held: dict[int, int] = {}
    for found in world.run(jobs.parameter_sizes, layout, case):
        for stage, shapes in found.items():
            for shape in shapes.values():
                whole = shape[0] * shape[1] if len(shape) == 2 else shape[0] / layout.tensor
                held[stage] = held.get(stage, 0) + whole
    planned = case.planned(layout)
    padding = -VOCABULARY % (16 * layout.tensor) * HIDDEN
    spec = planned.spec(VOCABULARY)
    for stage in planned.placement.stages:
        tables = stage.embeds + (stage.predicts and (untied or not stage.embeds))
        assert held.pop(stage.number) == (
            stage_parameters(spec.shape, spec.map, stage) + tables * padding
        )
    assert not held
