"""Runs of elements as boxes of a matrix: how a divided optimizer's state gets its names."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_kvshare.checkpoint.parts import optimizer_parts, rectangles, weight_parts
from megatron_kvshare.config import ParallelConfig, TrainConfig
from megatron_kvshare.megatron_api.optimizer import build_optimizer, wrap_data_parallel
from megatron_kvshare.megatron_api.optimizer_state import MegatronOptimizerState
from megatron_kvshare.sharing.patterns import build_map
from tests.product import Tiny


@pytest.mark.parametrize("shape", [(7,), (1, 5), (5, 1), (4, 3), (3, 4)], ids=str)
def test_every_run_of_elements_is_at_most_three_boxes(shape):
    full = torch.arange(torch.Size(shape).numel())
    for start, stop in itertools.combinations(range(len(full) + 1), 2):
        back = torch.full(shape, -1)
        boxes = list(rectangles(full[start:stop], start, shape))
        assert len(boxes) <= min(3, 2 * len(shape) - 1)
        for offset, data in boxes:
            ends = zip(offset, data.shape, strict=True)
            place = tuple(slice(begin, begin + size) for begin, size in ends)
            assert (back[place] == -1).all(), "boxes do not overlap"
            back[place] = data
        expected = torch.where((full >= start) & (full < stop), full, -1)
        assert torch.equal(back.flatten(), expected)


def test_no_elements_no_boxes():
    assert not list(rectangles(torch.empty(0), 4, (4, 3)))


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_parts_are_views_of_what_trains(single, distributed, bf16):
    """Loading writes through them; names and sizes are the same for every kind of optimizer."""
    layout = ParallelConfig(use_distributed_optimizer=distributed)
    model = Tiny(vocabulary=33).but(extra={"bf16": bf16}).model(build_map(4, "standard"), single)
    wrapped = wrap_data_parallel(model, layout)
    optimizer = build_optimizer([wrapped], TrainConfig(), layout, bf16)
    weights = weight_parts([model], single)
    moments = optimizer_parts(MegatronOptimizerState(optimizer), [model], single)
    kinds = ["exp_avg", "exp_avg_sq"] + ["fp32_param"] * bf16
    expected = {f"optimizer.state.{kind}.{part.name}" for part in weights for kind in kinds}
    assert {part.name for part in moments} == expected
    sizes = {part.name: torch.Size(part.shape).numel() for part in moments}
    assert sizes == {
        name: sum(part.data.numel() for part in moments if part.name == name) for name in sizes
    }
    for part in weights:
        part.data.fill_(3)
    assert all((weight[:33] == 3).all() for weight in model.parameters())
    for part in moments:
        part.data.fill_(5)
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    for parameter, state in inner.state.items():
        assert (state["exp_avg"] == 5).sum() >= 0.5 * state["exp_avg"].numel()
        assert (parameter == (5 if bf16 else 3)).any()
