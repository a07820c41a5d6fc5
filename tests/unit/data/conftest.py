"""Small texts, a small tokenizer and small token files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pytest

from megatron_kvshare.data.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_kvshare.megatron_api.datasets import TokenFileWriter

WORDS = "shared keys and values make a small cache; upward layers read what comes later. Why? "
UNICODE = "naïve café — 日本語 🙂 ∑x² tab\tend\r\n"

WriteTokens = Callable[..., str]


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("\n".join(WORDS[i:] + WORDS[:i] for i in range(len(WORDS))))
    job = TokenizerJob(inputs=(str(text),), output=str(folder / "tok"), vocab_size=400)
    return str(train_tokenizer(job).model)


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Write documents given as lists of token ids; returns the prefix."""

    def write(documents: Sequence[Sequence[int]], name: str = "data", vocab_size: int = 100) -> str:
        prefix = tmp_path / name
        writer = TokenFileWriter(prefix.with_name(name + ".bin"), vocab_size)
        for document in documents:
            writer.add_document(numpy.array(document, dtype=numpy.int64))
        writer.finalize(prefix.with_name(name + ".idx"))
        return str(prefix)

    return write


def counting_documents(number: int, first: int = 0, length: int = 20) -> list[list[int]]:
    """Documents of differing length with ids below 99 that end in 99."""
    sizes = numpy.random.default_rng(number).integers(1, 2 * length, size=number)
    return [[*((first + numpy.arange(size)) % 99).tolist(), 99] for size in sizes]
