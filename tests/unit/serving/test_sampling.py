"""Tokens are drawn from the distribution that was asked for; what is cut never comes."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_kvshare.errors import ConfigError
from megatron_kvshare.serving.request import Sampling
from megatron_kvshare.serving.sampling import Draw, draw, token_logprobs

VOCABULARY = 12
DRAWS = 4000
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def kept(sampling: Sampling) -> list[float]:
    """Probabilities by the definition, with Python's numbers."""
    scores = [float(x) / sampling.temperature for x in LOGITS]
    order = sorted(range(VOCABULARY), key=lambda token: -scores[token])
    alive = order[: sampling.top_k or None]
    total = sum(math.exp(scores[token]) for token in alive)
    probabilities = {token: math.exp(scores[token]) / total for token in alive}
    left, before = [], 0.0
    for token in alive:
        far = probabilities[token] < sampling.min_p * probabilities[alive[0]]
        if (before < sampling.top_p and not far) or not left:
            left.append(token)
        before += probabilities[token]
    total = sum(probabilities[token] for token in left)
    return [probabilities[token] / total if token in left else 0.0 for token in range(VOCABULARY)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=4),
        Sampling(top_p=0.6),
        Sampling(min_p=0.1, temperature=2.0),
        Sampling(top_k=6, top_p=0.8, min_p=0.05, temperature=1.3),
        Sampling(top_p=1e-6),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    rows = [Draw(sampling, 5, position, []) for position in range(DRAWS)]
    tokens = draw(LOGITS.expand(DRAWS, -1).clone(), rows).tokens
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY).tolist()
    for count, probability in zip(counts, kept(sampling), strict=True):
        if probability == 0:
            assert count == 0
            continue
        spread = math.sqrt(DRAWS * probability * (1 - probability))
        assert abs(count - DRAWS * probability) <= 4.5 * spread + 1e-6


def test_noise_depends_on_seed_and_position_alone() -> None:
    rows = [Draw(Sampling(), seed, position, []) for seed in (1, 2) for position in range(50)]
    together = draw(LOGITS.expand(100, -1).clone(), rows).tokens
    alone = [draw(LOGITS[None].clone(), [row]).tokens[0] for row in reversed(rows)]
    assert together == alone[::-1]
    assert together[:50] != together[50:]


def test_each_row_has_its_own_settings() -> None:
    best = int(LOGITS.argmax())
    penalty = Sampling(temperature=0, repetition_penalty=50.0)
    rows = [
        Draw(Sampling(temperature=0, top_k=3), 0, 0, []),
        Draw(penalty, 0, 0, [best, best, 1]),
        Draw(Sampling(top_k=1), 9, 3, []),
    ]
    tokens = draw(LOGITS.expand(3, -1).clone(), rows).tokens
    assert tokens[0] == tokens[2] == best
    assert tokens[1] not in (best, 1)


def test_penalty_lowers_what_was_there() -> None:
    """Positive logits are divided, negative ones multiplied: both come less often."""
    for token in (int(LOGITS.argmax()), 5):
        rows = [
            Draw(Sampling(repetition_penalty=1.5, logprobs=0), 1, position, [token])
            for position in range(1000)
        ]
        drawn = draw(LOGITS.expand(1000, -1).clone(), rows)
        share = drawn.tokens.count(token) / 1000
        plain = float(LOGITS.softmax(-1)[token])
        assert share <= plain + 4.5 * math.sqrt(plain * (1 - plain) / 1000)
        # What is reported is the model's own distribution.
        assert drawn.logprobs[0].logprob == pytest.approx(
            float(LOGITS.log_softmax(-1)[drawn.tokens[0]]), abs=1e-5
        )


def test_log_probabilities_and_alternatives() -> None:
    both = torch.stack((LOGITS, -LOGITS))
    first, second = token_logprobs(both, [3, 4], 2)
    assert first.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[3]))
    assert [token for token, _ in second.top] == (-LOGITS).topk(2).indices.tolist()
    assert token_logprobs(both, [3, 4], 0)[0].top == ()


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1, top_p=0, top_k=-2, min_p=2, stop=("",), seed=-1, logprobs=99)
    named = {fault.where for fault in caught.value.faults}
    assert named == {"temperature", "top_p", "top_k", "min_p", "stop", "seed", "logprobs"}
