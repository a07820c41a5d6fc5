"""Perplexity of a model on held-out tokens, and how far its sweeps are from exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy
import torch
from torch.nn import functional

from megatron_kvshare.config.blend import parse_split
from megatron_kvshare.data.inputs import InputOptions, open_inputs
from megatron_kvshare.data.token_files import open_checked
from megatron_kvshare.data.tokenizers import Tokenizer
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.evaluation.api import LoadedModel
from megatron_kvshare.megatron_api.datasets import DataPart, split_ranges


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means per predicted token, in nats.

    ``exact_loss``, ``gap`` = exact - by sweeps, and ``kl`` = KL(exact || by sweeps) over the first
    ``gap_tokens``; None for maps without upward layers, or when not measured.
    """

    tokens: int
    loss: float
    perplexity: float
    gap_tokens: int | None = None
    exact_loss: float | None = None
    gap: float | None = None
    kl: float | None = None

    def rows(self) -> dict[str, float | int]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def tokens_of_files(prefix: str, split: str | None, model: LoadedModel) -> torch.Tensor:
    """Token ids of ``.bin/.idx`` files, or of the documents that ``split`` keeps for validation.

    Raises:
        ConfigError: a crooked split.
        DataError: broken files, no documents, tokens outside the model's vocabulary.
    """
    files = open_checked(prefix)
    first, end = 0, files.num_documents
    if split is not None:
        first, end = split_ranges(parse_split(split), files.num_documents).get(
            DataPart.valid, (0, 0)
        )
    if not files.count_tokens(first, end):
        rule = f"no document of {prefix} with tokens is for validation"
        raise DataError(Fault("--split", split, rule, "leave it out to evaluate on all of them"))
    ids = torch.from_numpy(files.tokens(first, end).astype(numpy.int64))
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < model.spec.vocab_size:
            rule = f"the model has {model.spec.vocab_size} token ids"
            raise DataError(Fault(prefix, token, rule, "use data of the model's tokenizer"))
    return ids


def tokens_of_text(files: tuple[str, ...], tokenizer: Tokenizer, json_key: str) -> torch.Tensor:
    """Token ids of ``.jsonl`` or plain text, documents ended as in training.

    Raises:
        DataError: broken or empty files.
    """
    ids: list[int] = []
    for document in open_inputs(files, InputOptions(json_keys=(json_key,))).documents():
        ids += tokenizer.encode(document.texts[0])
        ids += [] if tokenizer.eod is None else [tokenizer.eod]
    if len(ids) < 2:
        raise DataError(Fault("--text", " ".join(files), "it holds no text", "give other files"))
    return torch.tensor(ids)


def windows(ids: torch.Tensor, length: int, batch: int) -> Iterator[torch.Tensor]:
    """``[b, length + 1]`` windows one after another, each token predicted once; what is left over
    comes last, alone."""
    count = (len(ids) - 1) // length
    whole = ids[: count * length + 1].unfold(0, length + 1, length) if count else ids.new_empty(0)
    yield from whole.split(batch) if count else ()
    rest = ids[count * length :]
    if len(rest) > 1:
        yield rest[None]


def score(
    model: LoadedModel,
    ids: torch.Tensor,
    length: int,
    batch: int,
    gap_tokens: int,
    done: Callable[[int, int], None] = lambda scored, of: None,
) -> Scores:
    """Score ``ids`` in windows of ``length``; the exact evaluation covers the first
    ``gap_tokens``, whole batches."""
    cyclic = model.spec.map.is_cyclic
    sums = {"loss": 0.0, "near": 0.0, "exact": 0.0, "kl": 0.0}
    tokens = near_tokens = 0
    for window in windows(ids, length, batch):
        inputs, labels = window[:, :-1], window[:, 1:].to(model.device)
        swept = model.logits(inputs).log_softmax(-1)
        loss = _sum_loss(swept, labels)
        sums["loss"] += loss
        tokens += labels.numel()
        if cyclic and near_tokens < gap_tokens:
            exact = model.logits(inputs, mode="exact").log_softmax(-1)
            near_tokens += labels.numel()
            sums["near"] += loss
            sums["exact"] += _sum_loss(exact, labels)
            sums["kl"] += float((exact.exp() * (exact - swept)).sum(dtype=torch.float64))
        done(tokens, len(ids) - 1)
    mean = sums["loss"] / tokens
    scores = {"tokens": tokens, "loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    if near_tokens:
        exact_loss = sums["exact"] / near_tokens
        scores |= {"gap_tokens": near_tokens, "exact_loss": exact_loss}
        scores["gap"] = exact_loss - sums["near"] / near_tokens
        scores["kl"] = sums["kl"] / near_tokens
    return Scores(**scores)  # type: ignore[arg-type]


def _sum_loss(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    losses = functional.nll_loss(
        log_probabilities.flatten(0, 1), labels.flatten(), reduction="none"
    )
    return float(losses.sum(dtype=torch.float64))
