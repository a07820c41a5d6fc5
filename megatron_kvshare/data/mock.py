"""Made-up samples for runs without data."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


class MockSamples:
    """Documents that count upward with a random start and step: endless, and learnable.

    Args:
        size: samples before they repeat.
        seq_length: tokens per sample.
        vocab_size: ids 0 ... vocab_size - 1 appear.
        eod: end-of-document token.
        seed: decides all samples.
    """

    def __init__(self, size: int, seq_length: int, vocab_size: int, eod: int, seed: int) -> None:
        self.size = size
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.eod = eod
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        random = numpy.random.default_rng([self.seed, index])
        length = self.seq_length + 1
        tokens = numpy.empty(0, dtype=numpy.int64)
        while tokens.size < length:
            start, step = random.integers(0, self.vocab_size), random.integers(1, 4)
            count = random.integers(8, max(9, self.seq_length))
            document = (start + step * numpy.arange(count)) % self.vocab_size
            tokens = numpy.concatenate([tokens, document, [self.eod]])
        return torch.from_numpy(tokens[:length].copy())
