"""Token files from token files: the same documents, byte for byte as megatron-core writes them."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy
import pytest
import torch

from megatron_kvshare.config import DataConfig
from megatron_kvshare.data import rearrange, train_data
from megatron_kvshare.data.corpus import Corpus, open_corpus
from megatron_kvshare.data.data_plan import DataRequest
from megatron_kvshare.data.duplicates import find_duplicates
from megatron_kvshare.data.inspect import inspect, samples
from megatron_kvshare.data.publish import NOTES
from megatron_kvshare.data.rearrange import merge, shuffle, split
from megatron_kvshare.data.token_files import open_checked
from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.errors import DataError
from megatron_kvshare.megatron_api.datasets import IndexedDataset, IndexedDatasetBuilder

from .conftest import WriteTokens

SMALL, LARGE = 100, 70_000
"""Vocabularies whose ids take two and four bytes."""


def random_documents(seed: int, count: int, top: int = 99) -> list[list[int]]:
    """Some of them empty, and many equal."""
    random = numpy.random.default_rng(seed)
    kinds = [random.integers(0, top, size=size).tolist() for size in random.integers(0, 30, 40)]
    return [kinds[number] for number in random.integers(0, len(kinds), count)]


def documents_of(prefix: str) -> list[list[int]]:
    """As megatron-core reads them; the product's own check passes too."""
    open_checked(prefix)
    return [document.tolist() for document in IndexedDataset(prefix)]


def notes_of(prefix: str) -> dict[str, object]:
    return json.loads(Path(prefix + NOTES).read_text())


@pytest.fixture
def two(write_tokens: WriteTokens) -> tuple[list[str], list[list[int]]]:
    """Two pairs of files, and all their documents."""
    documents = random_documents(0, 150), random_documents(1, 90)
    prefixes = [write_tokens(each, name) for each, name in zip(documents, "ab", strict=True)]
    return prefixes, [*documents[0], *documents[1]]


def test_a_merge_is_megatrons(two: tuple, tmp_path: Path) -> None:
    prefixes, documents = two
    out = str(tmp_path / "out" / "merged")
    (made,) = merge(open_corpus(prefixes), out).made
    assert documents_of(out) == documents
    assert (made.documents, made.tokens) == (240, sum(map(len, documents)))
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=numpy.uint16)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "stock.idx"))
    for suffix in (".bin", ".idx"):
        assert Path(out + suffix).read_bytes() == (tmp_path / f"stock{suffix}").read_bytes()
    notes = notes_of(out)
    assert notes["documents"] == 240 and notes["index_sha256"] == open_checked(out).index.sha256


def test_documents_of_several_sequences_stay_together(tmp_path: Path) -> None:
    """As Megatron's --split-sentences writes them; with its modes they are not text."""
    for name, lengths in {"a": [[3, 2], [4], []], "b": [[1], [5, 5, 5]]}.items():
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=numpy.int32)
        for each in lengths:
            builder.add_document(numpy.arange(sum(each)), each)
        builder.finalize(str(tmp_path / f"{name}.idx"))
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=numpy.int32)
    for name in "ab":
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "stock.idx"))
    corpus = open_corpus([str(tmp_path / name) for name in "ab"])
    merge(corpus, str(tmp_path / "out"))
    for suffix in (".bin", ".idx"):
        ours, stock = (tmp_path / f"{name}{suffix}" for name in ("out", "stock"))
        assert ours.read_bytes() == stock.read_bytes()
    for act in (
        lambda: shuffle(corpus, str(tmp_path / "no"), 0, 1 << 20),
        lambda: split(corpus, str(tmp_path / "no"), (1.0, 1.0)),
        lambda: merge(corpus, str(tmp_path / "no"), dedup=True),
    ):
        with pytest.raises(DataError, match="several sequences"):
            act()


def test_ids_of_different_width(write_tokens: WriteTokens, tmp_path: Path) -> None:
    small, large = [[1, 2], [98]], [[69_000, 5], [1, 2]]
    prefixes = [write_tokens(small, "s", SMALL), write_tokens(large, "l", LARGE)]
    out = str(tmp_path / "out")
    merge(open_corpus(prefixes), out)
    assert documents_of(out) == [*small, *large]
    assert open_checked(out).index.dtype == numpy.int32
    merge(open_corpus(prefixes), out, dedup=True)
    assert documents_of(out) == [[1, 2], [98], [69_000, 5]]


@pytest.mark.parametrize("how", ["merge", "shuffle", "split"])
def test_only_the_first_of_equal_documents_stays(two: tuple, tmp_path: Path, how: str) -> None:
    prefixes, documents = two
    unique = [list(each) for each in dict.fromkeys(map(tuple, documents))]
    corpus, out = open_corpus(prefixes), str(tmp_path / "out")
    if how == "merge":
        result = merge(corpus, out, dedup=True)
        assert documents_of(out) == unique
    elif how == "shuffle":
        result = shuffle(corpus, out, 0, 1 << 10, dedup=True)
        assert sorted(documents_of(out)) == sorted(unique)
    else:
        result = split(corpus, out, (80.0, 20.0), dedup=True)
        assert [*documents_of(f"{out}_train"), *documents_of(f"{out}_valid")] == unique
    assert result.left_out == 240 - len(unique) > 150


def test_duplicates_are_counted(two: tuple) -> None:
    prefixes, documents = two
    found = find_duplicates(open_corpus(prefixes))
    counts = Counter(map(tuple, documents))
    assert found.groups == sum(count > 1 for count in counts.values()) > 20
    seen: set[tuple[int, ...]] = set()
    for is_first, document in zip(found.first.tolist(), map(tuple, documents), strict=True):
        assert is_first == (document not in seen)
        seen.add(document)


@pytest.mark.parametrize("most_bytes", [100, 1 << 13, 1 << 30])
def test_a_shuffle_does_not_depend_on_memory(
    two: tuple, tmp_path: Path, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, documents = two
    monkeypatch.setattr("megatron_kvshare.data.duplicates.MANY_DOCUMENTS", 64)
    corpus = open_corpus(prefixes)
    shuffle(corpus, str(tmp_path / "all"), 7, 1 << 40)
    shuffle(corpus, str(tmp_path / "out"), 7, most_bytes)
    found = documents_of(str(tmp_path / "out"))
    assert found == documents_of(str(tmp_path / "all")) != documents
    assert sorted(found) == sorted(documents)


def test_a_shuffle_is_uniform(write_tokens: WriteTokens, tmp_path: Path) -> None:
    """Every document is as likely in every tenth of the output: chi-squared over 100 seeds."""
    corpus = open_corpus([write_tokens([[number] for number in range(10)], "ten")])
    table = numpy.zeros((10, 10))
    orders = set()
    for seed in range(100):
        (order,) = (each for each in rearrange._random_order(10, seed, 1, None))
        table[order, numpy.arange(10)] += 1
        orders.add(tuple(order.tolist()))
    assert len(orders) == 100
    assert ((table - 10) ** 2 / 10).sum() < 144  # 81 degrees of freedom: exceeded by 1 in 50,000
    assert corpus.num_documents == 10


def test_a_shuffle_takes_the_memory_it_is_given(write_tokens: WriteTokens, tmp_path: Path) -> None:
    """16 MB of documents by 1 MB at a time."""
    prefix = write_tokens([list(range(90)) * 89] * 1000, "large")
    corpus, peaks = open_corpus([prefix]), []
    for most_bytes in (1_000_000, 8_000_000):
        tracemalloc.start()
        shuffle(corpus, str(tmp_path / "out"), 0, most_bytes)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 2_500_000 < 8_000_000 < peaks[1]


def test_a_split_is_that_of_training(two: tuple, tmp_path: Path) -> None:
    """Samples too, for training shuffles the same number of documents."""
    (prefix, _), _ = two
    out = str(tmp_path / "out")
    result = split(open_corpus([prefix]), out, (80.0, 20.0))
    assert [made.prefix for made in result.made] == [f"{out}_train", f"{out}_valid"]
    vocabulary = Vocabulary(SMALL, eod=99)
    request = DataRequest(
        seq_length=16, global_batch_size=4, train_iters=9, eval_iters=2, vocabulary=vocabulary
    )
    separate = DataConfig(train_data_path=(f"{out}_train",), valid_data_path=(f"{out}_valid",))
    parts = []
    for config in (DataConfig(data_path=(prefix,), split="80,20,0"), separate):
        data = train_data.build(config, request)
        batches = [*islice(data.train_batches(), 36), *data.valid_batches()]
        parts.append([batch.tokens for batch in batches])
    assert all(map(torch.equal, parts[0][:36], parts[1][:36]))
    held_out = [
        Counter(t for batch in each[36:] for t in batch.flatten().tolist()) for each in parts
    ]
    assert held_out[0].keys() <= held_out[1].keys() | {0}


def test_notes_that_agree_are_kept(write_tokens: WriteTokens, tmp_path: Path) -> None:
    prefixes = [write_tokens([[1, 2]], name) for name in "ab"]
    notes = {"tokenizer_sha256": "x", "vocab_size": 100, "append_eod": True, "documents": 1}
    for prefix, more in zip(prefixes, ({}, {"append_eod": False}), strict=True):
        Path(prefix + NOTES).write_text(json.dumps(notes | more))
    corpus, out = open_corpus(prefixes), str(tmp_path / "out")
    merge(corpus, out)
    kept = {"tokenizer_sha256": "x", "vocab_size": 100, "documents": 2, "tokens": 4}
    assert notes_of(out) == kept | {"index_sha256": open_checked(out).index.sha256}
    assert rearrange.differing_notes(corpus) == ["append_eod"]
    Path(prefixes[1] + NOTES).unlink()
    corpus = open_corpus(prefixes)
    merge(corpus, out)
    assert "tokenizer_sha256" not in notes_of(out)
    assert "tokenizer_sha256" in rearrange.differing_notes(corpus)


def test_different_tokenizers_are_not_mixed(write_tokens: WriteTokens) -> None:
    prefixes = [write_tokens([[1, 2]], name) for name in "ab"]
    for prefix in prefixes:
        Path(prefix + NOTES).write_text(json.dumps({"tokenizer_sha256": prefix}))
    with pytest.raises(DataError, match="another tokenizer than"):
        open_corpus(prefixes)


def test_a_folder_stands_for_its_files(two: tuple, tmp_path: Path) -> None:
    prefixes, documents = two
    assert open_corpus([str(tmp_path)]).num_documents == len(documents)
    with pytest.raises(DataError, match="given twice"):
        open_corpus([str(tmp_path), prefixes[0]])
    Path(prefixes[0], "cache").mkdir(parents=True)  # as training makes it
    assert open_corpus(prefixes[:1]).num_documents == 150
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError) as caught:
        open_corpus([str(tmp_path / "none"), str(tmp_path / "nothing")])
    assert "no .idx files" in str(caught.value)


Act = Callable[[Corpus, str], object]
ACTS: dict[str, Act] = {
    "merge": lambda corpus, out: merge(corpus, out),
    "shuffle": lambda corpus, out: shuffle(corpus, out, 0, 1 << 20),
    "split": lambda corpus, out: split(corpus, out, (1.0,)),
}


@pytest.mark.parametrize("name", ACTS)
def test_nothing_is_left_of_what_fails(
    two: tuple, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    corpus = open_corpus(two[0])
    if name != "split":
        with pytest.raises(DataError, match="what it is made of"):
            ACTS[name](corpus, two[0][0])
    monkeypatch.setattr(
        rearrange, "write_index", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(DataError, match=r"--output-prefix.*full"):
        ACTS[name](corpus, str(out / "x"))
    assert list(tmp_path.glob("out/*")) == []


def test_what_a_killed_command_left_goes(two: tuple, tmp_path: Path) -> None:
    left = tmp_path / "out.bin.0123456789ab.partial"
    left.touch()
    merge(open_corpus(two[0]), str(tmp_path / "out"))
    assert not left.exists() and not list(tmp_path.glob("*.partial"))


def test_files_that_shrink_are_told(two: tuple, tmp_path: Path) -> None:
    corpus = open_corpus(two[0])
    with Path(two[0][1] + ".bin").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(DataError, match="has become shorter"):
        merge(corpus, str(tmp_path / "out"))


def test_what_an_inspection_finds(two: tuple) -> None:
    prefixes, documents = two
    found = inspect(open_corpus(prefixes), seq_length=16)
    sizes = sorted(map(len, documents))
    assert (found.documents, found.tokens) == (240, sum(sizes))
    assert (found.shortest, found.longest) == (sizes[0], sizes[-1])
    for share, length in found.quantiles.items():
        assert sum(size <= length for size in sizes) >= share * 240
        assert sum(size < length for size in sizes) < share * 240
    assert found.bins == tuple(
        sum(size.bit_length() == digits for size in sizes) for digits in range(6)
    )
    assert found.longer == sum(size > 16 for size in sizes)
    assert found.longer_tokens == sum(size for size in sizes if size > 16)
    unique = set(map(tuple, documents))
    assert found.repeated.documents == 240 - len(unique)
    assert found.repeated.tokens == sum(sizes) - sum(map(len, unique))
    text = "\n".join(found.lines())
    assert "240 documents" in text and "16-31" in text
    assert f"exact duplicates: {240 - len(unique)} (" in text
    assert inspect(open_corpus(prefixes), 16, duplicates=False).repeated is None


def test_an_empty_corpus_cannot_be_inspected(write_tokens: WriteTokens) -> None:
    prefix = write_tokens([[1]], "a")
    corpus = open_corpus([prefix])
    corpus.lengths = numpy.zeros(1, numpy.int32)
    with pytest.raises(DataError, match="no tokens"):
        inspect(corpus, 16)


def test_samples_are_the_starts_of_documents(two: tuple) -> None:
    prefixes, documents = two
    corpus = open_corpus(prefixes)
    shown = samples(corpus, 5, 0, None)
    assert len(shown) == 5 and shown != samples(corpus, 5, 1, None)
    for line in shown:
        number = int(line.split()[1])
        ids = line.split(": ")[1].split() if ": " in line.strip() else []
        assert list(map(int, ids)) == documents[number]
    numbers = load_tokenizer("NullTokenizer", None, SMALL)
    assert [line.replace("'", "") for line in samples(corpus, 5, 0, numbers)] == shown
    assert len(samples(corpus, 1000, 0, None)) == 240
