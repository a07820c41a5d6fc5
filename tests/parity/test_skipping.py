"""Skipping what a pass does not need gives the same bits as running every layer in full."""

from __future__ import annotations

import torch

from megatron_kvshare.sharing.map import SharingMap
from tests.parity.cases import each_map
from tests.product import Tiny, load_by_name, loss_and_gradients, random_tokens

TINY = Tiny()


@each_map(4, 8, cyclic=True)
def test_loss_and_gradients_do_not_depend_on_skipping(sharing: SharingMap, single):
    tokens, labels = (random_tokens(TINY.vocabulary, 2, 12, seed) for seed in (0, 1))
    documents = torch.tensor([[0] * 12, [1] * 5 + [2] * 7])
    for passes in ((2, 2), (0, 2), (1, 1), (0, 1)):
        found = []
        for skip in (True, False):
            model = TINY.model(sharing, single, passes, skip=skip)
            load_by_name(model, TINY.weights(sharing))
            found.append(loss_and_gradients(model, single, tokens, labels, document_ids=documents))
        (loss, gradients), (full_loss, full_gradients) = found
        assert loss == full_loss
        different = [n for n in gradients if not torch.equal(gradients[n], full_gradients[n])]
        assert not different, f"gradients are not bit-equal with passes {passes}: {different}"
