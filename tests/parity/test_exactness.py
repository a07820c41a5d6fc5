"""Iterated evaluation against the definition of the model: one token after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_kvshare.model.visibility import SequenceLayout
from megatron_kvshare.sharing.patterns import build_map
from tests.maps import NINE
from tests.parity.cases import each_map, one_of_each_pattern
from tests.product import Tiny, load_by_name, random_tokens

TINY = Tiny()
LENGTH = 12
TOLERANCE = 1e-5
"""Largest allowed difference of logits, relative to the largest logit."""


@torch.no_grad()
def logits_of(model, tokens: Tensor, **where: Tensor) -> Tensor:
    return model(tokens, **where).value[..., : model.spec.vocab_size]


def assert_logits(got: Tensor, exact: Tensor) -> None:
    assert (got - exact).abs().max() <= TOLERANCE * exact.abs().max()


@each_map()
def test_passes_equal_token_by_token_as_far_as_they_reach(sharing, single):
    """After n passes the first n tokens are exact; with n >= T the whole sequence is."""
    weights = TINY.weights(sharing)
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    exact = TINY.oracle(sharing, weights).token_by_token(tokens)
    passes = (LENGTH, 7, 3, 2, 1) if sharing.is_cyclic else (1,)
    for number in passes:
        model = TINY.model(sharing, single, (number - 1, 1))
        load_by_name(model, weights)
        reach = number if sharing.is_cyclic else LENGTH
        logits = logits_of(model, tokens)
        assert_logits(logits[:, :reach], exact[:, :reach])


@each_map()
def test_a_later_token_never_changes_an_earlier_logit(sharing, single):
    model = TINY.model(sharing, single, (2, 2))
    load_by_name(model, TINY.weights(sharing))
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    before = logits_of(model, tokens)
    for changed in (1, 5, LENGTH - 1):
        others = tokens.clone()
        others[:, changed:] = (others[:, changed:] + 7) % TINY.vocabulary
        after = logits_of(model, others)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.equal(after[:, changed], before[:, changed])


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [3] * 2 + [4] * 10])
RESTARTED = torch.tensor([[*range(5), 0, *range(6)], [*range(2), *range(10)]])


@one_of_each_pattern()
@pytest.mark.parametrize("restart", [True, False], ids=["restarted", "running"])
def test_packed_documents_equal_token_by_token(sharing, restart, single):
    weights = TINY.weights(sharing)
    tokens = random_tokens(TINY.vocabulary, 2, LENGTH)
    positions = RESTARTED if restart else None
    exact = TINY.oracle(sharing, weights).token_by_token(tokens, DOCUMENTS, positions)
    model = TINY.model(sharing, single, (LENGTH - 1, 1))
    load_by_name(model, weights)
    got = logits_of(model, tokens, document_ids=DOCUMENTS, position_ids=positions)
    assert_logits(got, exact)


@one_of_each_pattern()
def test_packed_documents_equal_documents_alone(sharing, single):
    """Logits, and the gradient of the summed loss, at a number of passes that does not converge."""
    model = TINY.model(sharing, single, (1, 2))
    load_by_name(model, TINY.weights(sharing))
    tokens, labels = (random_tokens(TINY.vocabulary, 2, LENGTH, seed) for seed in (0, 1))

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    where = {"document_ids": DOCUMENTS, "position_ids": RESTARTED}
    packed = logits_of(model, tokens, **where)
    model(tokens, labels, **where).loss.backward()
    packed_gradients = gradients()
    for row, document in sorted({(r, int(d)) for r in range(2) for d in DOCUMENTS[r]}):
        inside = DOCUMENTS[row] == document
        alone = tokens[row, inside][None], labels[row, inside][None]
        assert_logits(logits_of(model, alone[0])[0], packed[row, inside])
        model(*alone).loss.backward()
    for packed_one, alone_one in zip(packed_gradients, gradients(), strict=True):
        assert (packed_one - alone_one).norm() <= TOLERANCE * alone_one.norm()


@pytest.mark.parametrize("pattern", NINE)
def test_the_suite_sees_one_token_too_many(pattern, monkeypatch, single):
    """Letting upward layers see the current token moves logits far beyond the tolerance."""
    sharing = build_map(4, pattern, 2)
    weights = TINY.weights(sharing)
    tokens = random_tokens(TINY.vocabulary, 1, LENGTH)
    exact = TINY.oracle(sharing, weights).token_by_token(tokens)
    model = TINY.model(sharing, single, (LENGTH - 1, 1))
    load_by_name(model, weights)
    plain = SequenceLayout.visibility
    monkeypatch.setattr(
        SequenceLayout, "visibility", lambda self, strict, window: plain(self, False, window)
    )
    difference = (logits_of(model, tokens) - exact).abs().max() / exact.abs().max()
    assert bool(difference > 1e-3) == sharing.is_cyclic
