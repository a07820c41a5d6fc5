"""From logits to tokens: each row by its own request's settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_kvshare.serving.request import Sampling, TokenLogprob


class Draw(NamedTuple):
    """One row's request: its settings with a ``seed``, the ``position`` the token will have, and
    the tokens before it."""

    sampling: Sampling
    seed: int
    position: int
    tokens: Sequence[int]


class Drawn(NamedTuple):
    """``logprobs``: of rows that ask for them, else None."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]


def draw(logits: torch.Tensor, rows: Sequence[Draw]) -> Drawn:
    """``[b, vocab]`` fp32 -> a token of each row.

    With a temperature the noise is Gumbel's (the largest of logit + noise is a sample of the
    distribution), so a change of logits below the margin of the two largest changes nothing.
    """
    scores = logits
    if not all(_takes_the_likeliest(row.sampling) for row in rows):
        scores = _cut(_scaled(_penalised(logits, rows), rows), rows)
    for number, row in enumerate(rows):
        if row.sampling.temperature > 0:
            scores[number] -= _noise(row, logits)
    tokens = scores.argmax(-1).tolist()
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if row.sampling.logprobs is not None:
            one = logits[number : number + 1]
            (logprobs[number],) = token_logprobs(one, [token], row.sampling.logprobs)
    return Drawn(tokens, logprobs)


def token_logprobs(
    logits: torch.Tensor, targets: Sequence[int], alternatives: int
) -> list[TokenLogprob]:
    """``[n, vocab]`` and the token of each row -> its log-probability, and so many of the
    likeliest."""
    if not targets:
        return []
    logprobs = logits.log_softmax(-1)
    index = torch.tensor(targets, device=logits.device)
    own = logprobs.gather(1, index[:, None])[:, 0].tolist()
    top: list[tuple[tuple[int, float], ...]] = [()] * len(targets)
    if alternatives:
        values, ids = logprobs.topk(min(alternatives, logits.shape[1]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = [tuple(zip(*pair, strict=True)) for pair in pairs]
    return [TokenLogprob(*each) for each in zip(targets, own, top, strict=True)]


def _takes_the_likeliest(sampling: Sampling) -> bool:
    """Whatever is cut, the likeliest token stays."""
    return sampling.temperature == 0 and sampling.repetition_penalty == 1


def _penalised(logits: torch.Tensor, rows: Sequence[Draw]) -> torch.Tensor:
    """A copy, in which tokens that were there before count less (CTRL, arXiv 1909.05858)."""
    scores = logits.clone()
    for number, row in enumerate(rows):
        penalty = row.sampling.repetition_penalty
        if penalty != 1:
            index = torch.tensor(sorted(set(row.tokens)), device=logits.device)
            seen = scores[number, index]
            scores[number, index] = torch.where(seen > 0, seen / penalty, seen * penalty)
    return scores


def _scaled(scores: torch.Tensor, rows: Sequence[Draw]) -> torch.Tensor:
    temperatures = [row.sampling.temperature or 1.0 for row in rows]
    if all(temperature == 1 for temperature in temperatures):
        return scores
    return scores / torch.tensor(temperatures, device=scores.device)[:, None]


def _cut(scores: torch.Tensor, rows: Sequence[Draw]) -> torch.Tensor:
    """Without the tokens that ``top_k``, ``top_p`` and ``min_p`` leave out; the likeliest stays."""
    cutting = [
        number
        for number, row in enumerate(rows)
        if (row.sampling.top_k, row.sampling.top_p, row.sampling.min_p) != (0, 1.0, 0.0)
    ]
    if not cutting:
        return scores
    device, vocab = scores.device, scores.shape[1]
    settings = [rows[number].sampling for number in cutting]
    top_k = torch.tensor([each.top_k or vocab for each in settings], device=device)[:, None]
    top_p = torch.tensor([each.top_p for each in settings], device=device)[:, None]
    min_p = torch.tensor([each.min_p for each in settings], device=device)[:, None]
    ordered, index = scores[cutting].sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=device)
    kept = rank < top_k
    probabilities = ordered.masked_fill(~kept, float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept &= before < top_p
    kept &= probabilities >= min_p * probabilities[:, :1]
    kept[:, 0] = True
    ordered = ordered.masked_fill(~kept, float("-inf"))
    scores[cutting] = torch.empty_like(ordered).scatter_(1, index, ordered)
    return scores


def _noise(row: Draw, logits: torch.Tensor) -> torch.Tensor:
    """``[vocab]``: minus Gumbel's noise, a function of seed and position on a kind of device."""
    name = f"{row.seed}:{row.position}".encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
    generator = torch.Generator(logits.device).manual_seed(seed)
    uniform = torch.empty(logits.shape[1], device=logits.device, dtype=torch.float32)
    return uniform.exponential_(generator=generator).log_()
