"""The published passes, spelled out over the model's own layers: the plan gives the same bits."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.model.block import BlockOutput, SharedKVBlock, StageTensors
from megatron_kvshare.model.kv import KVBlocks
from megatron_kvshare.model.kv_view import KVView
from megatron_kvshare.sharing.solver import RECIPES
from tests.parity.cases import one_of_each_pattern
from tests.product import Tiny, load_by_name, loss_and_gradients, random_tokens

TINY = Tiny()
LENGTH = 11


class Published(torch.nn.Module):
    """Every layer in full in every pass; the KV of the pass before for upward layers."""

    def __init__(self, model: SharedKVBlock, passes: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.passes = model, passes

    def forward(self, entering, contexts, plan, measure_residual):
        sharing, hidden = plan.map, entering.hidden
        kv: dict[int, KVBlocks] = {}
        groups, layer = dict(sharing.cyclic_groups), 0
        while layer < sharing.num_layers:
            last = groups.get(layer, layer)
            without, with_gradient = self.passes if layer in groups else (0, 1)
            entered = hidden
            for number in range(without + with_gradient):
                with torch.set_grad_enabled(number >= without and torch.is_grad_enabled()):
                    hidden = self.one_pass(range(layer, last + 1), entered, kv, contexts.whole)
            layer = last + 1
        return BlockOutput(StageTensors(hidden, {}), None)

    def one_pass(self, layers, hidden, kv, context):
        sharing = self.model.sharing
        for number in layers:
            layer, source = self.model.layers[number], sharing.sources[number]
            if source == number:
                hidden, view = layer(hidden, KVView({}, context))
                kv[number] = view.blocks(number)
            elif source in kv:
                hidden, _ = layer(hidden, KVView({source: kv[source]}, context))
            else:
                hidden = layer.feed_forward(hidden.view_as(hidden))
        return hidden


@pytest.mark.parametrize("passes", [(7, 2), (1, 2), (0, 1)])
@one_of_each_pattern()
def test_paper_gives_the_bits_of_the_published_passes(sharing, passes, single, monkeypatch):
    tokens, labels = (random_tokens(TINY.vocabulary, 2, LENGTH, seed) for seed in (0, 1))
    model = TINY.model(sharing, single, passes)
    load_by_name(model, TINY.weights(sharing))
    loss, gradients = loss_and_gradients(model, single, tokens, labels)
    published = Published(model.decoder, passes)
    monkeypatch.setattr(model.decoder, "forward", published.forward)
    same_loss, same_gradients = loss_and_gradients(model, single, tokens, labels)
    assert loss == same_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name


def test_paper_is_the_published_recipe():
    paper = RECIPES["paper"]
    assert (paper.forward_sweeps, paper.backward_sweeps, paper.stride) == (7, 2, 1)
    assert (str(paper.start), paper.project_at_use) == ("zero", False)
