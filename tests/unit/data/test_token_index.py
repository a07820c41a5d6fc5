"""A damaged index is refused before anything is read by it; stock megatron-core is the judge."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy
import pytest

from megatron_kvshare.data.data_plan import DataRequest
from megatron_kvshare.data.token_files import open_checked
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.errors import DataError
from megatron_kvshare.megatron_api import datasets
from megatron_kvshare.megatron_api.datasets import IndexedDataset
from tests.mutations import mutations

from .conftest import WriteTokens, counting_documents
from .test_data_errors import plan

HEADER = 34
DOCUMENTS = 12


def set_number(prefix: str, offset: int, kind: str, change: int) -> None:
    """Add ``change`` to the number at ``offset`` of the index."""
    path = Path(prefix + ".idx")
    content = bytearray(path.read_bytes())
    (number,) = struct.unpack_from(kind, content, offset)
    struct.pack_into(kind, content, offset, number + change)
    path.write_bytes(content)


POINTERS = HEADER + 4 * DOCUMENTS
BORDERS = POINTERS + 8 * DOCUMENTS


@pytest.mark.parametrize(
    ("offset", "kind", "change", "message"),
    [
        (POINTERS + 8 * 5, "<q", 2, "document 5 starts at byte"),
        (POINTERS, "<q", 8, "document 0 starts at byte 8 of .bin, after those before it at 0"),
        (POINTERS + 8 * (DOCUMENTS - 1), "<q", -1, "document 11 starts at byte"),
        (HEADER + 4 * 3, "<i", 1, "bytes of tokens"),
        (HEADER + 4 * 3, "<i", -100, "document 3 has -"),
        (BORDERS, "<q", 1, "borders do not rise from 0 to 12"),
        (BORDERS + 8 * 4, "<q", 5, "borders do not rise"),
        (BORDERS + 8 * DOCUMENTS, "<q", -1, "borders do not rise"),
        (17, "<B", -1, "not a Megatron index"),  # 64-bit float
        (9, "<Q", 1, "not a Megatron index"),
        (18, "<Q", -1, "bytes after its"),
        (26, "<Q", 1, "cut off: 282 of 290 bytes"),
        (18, "<q", 1 << 60, "cut off"),
    ],
)
def test_every_number_of_the_index_is_checked(
    write_tokens: WriteTokens, offset: int, kind: str, change: int, message: str
) -> None:
    prefix = write_tokens(counting_documents(DOCUMENTS))
    set_number(prefix, offset, kind, change)
    with pytest.raises(DataError, match=message):
        open_checked(prefix)


def test_two_lengths_that_balance_are_found_by_their_offsets(write_tokens: WriteTokens) -> None:
    prefix = write_tokens(counting_documents(DOCUMENTS))
    set_number(prefix, HEADER + 4 * 3, "<i", 1)
    set_number(prefix, HEADER + 4 * 7, "<i", -1)
    with pytest.raises(DataError, match="document 4 starts at byte"):
        open_checked(prefix)


def test_offsets_are_checked_across_chunks(
    write_tokens: WriteTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_kvshare.data.token_index._CHUNK", 5)
    prefix = write_tokens(counting_documents(DOCUMENTS))
    assert open_checked(prefix).num_documents == DOCUMENTS
    set_number(prefix, POINTERS + 8 * 10, "<q", 2)
    with pytest.raises(DataError, match="document 10 starts at byte"):
        open_checked(prefix)


def test_stock_files_with_several_sequences_to_a_document(tmp_path: Path) -> None:
    builder = datasets.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=numpy.int32)
    for lengths in ([3, 0, 2], [1], [4, 4]):
        builder.add_document(numpy.arange(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "a.idx"))
    files = open_checked(str(tmp_path / "a"))
    assert files.index.lengths.tolist() == [3, 0, 2, 1, 4, 4]


def test_multimodal_files_are_refused_by_name(tmp_path: Path) -> None:
    builder = datasets.IndexedDatasetBuilder(str(tmp_path / "a.bin"), multimodal=True)
    for length in (3, 5):
        builder.add_document(numpy.arange(length), [length], [0])
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(DataError, match="multimodal"):
        open_checked(str(tmp_path / "a"))


def check_mutations(prefix: str, count: int, seed: int) -> int:
    """How many of ``count`` damaged indices are accepted; each must change no token."""
    path = Path(prefix + ".idx")
    original, sha256 = path.read_bytes(), open_checked(prefix).index.sha256
    stock = IndexedDataset(prefix)
    expected = [stock[number].tolist() for number in range(len(stock))]
    accepted = 0
    for what, content in mutations(original, count, seed):
        path.unlink()
        path.write_bytes(content)
        try:
            files = open_checked(prefix)
        except DataError:
            continue
        accepted += 1
        stock = IndexedDataset(prefix)
        assert [stock[number].tolist() for number in range(len(stock))] == expected, what
        assert files.index.sha256 != sha256, what
    return accepted


def test_damaged_indices_never_change_what_is_read(write_tokens: WriteTokens) -> None:
    prefix = write_tokens(counting_documents(DOCUMENTS))
    assert check_mutations(prefix, 100, seed=1) < 10


@pytest.mark.nightly
@pytest.mark.parametrize("vocab_size", [100, 100_000])
@pytest.mark.parametrize("documents", [1, 40])
def test_many_damaged_indices(write_tokens: WriteTokens, documents: int, vocab_size: int) -> None:
    prefix = write_tokens(counting_documents(documents), vocab_size=vocab_size)
    assert check_mutations(prefix, 2_000, seed=documents) < 200


def test_borders_and_type_are_part_of_what_a_run_reads(write_tokens: WriteTokens) -> None:
    """They change no token of a file that is accepted, but it is another file."""
    prefix = write_tokens(counting_documents(DOCUMENTS))
    sound = plan(data_path=(prefix,), split="1,1,0")
    assert sound.identity["train"][0]["index_sha256"] == open_checked(prefix).index.sha256
    set_number(prefix, BORDERS + 8 * 4, "<q", 1)
    changed = plan(data_path=(prefix,), split="1,1,0")
    assert changed.rows[0].fingerprint == sound.rows[0].fingerprint
    assert changed.identity != sound.identity
    request = DataRequest(
        seq_length=16, global_batch_size=4, train_iters=1, vocabulary=Vocabulary(100)
    )
    names = [each.rows[0].spec(request).index_sha256 for each in (sound, changed)]
    assert names[0] != names[1]


@pytest.mark.parametrize("replaced", [".idx", "both", "gone"])
def test_files_replaced_after_the_check_are_not_read(
    write_tokens: WriteTokens, tmp_path: Path, replaced: str
) -> None:
    prefix = write_tokens(counting_documents(40))
    (row,) = plan(data_path=(prefix,), split="1", eval_iters=0).rows
    request = DataRequest(
        seq_length=16, global_batch_size=4, train_iters=1, vocabulary=Vocabulary(100)
    )
    spec = row.spec(request)
    assert len(datasets.build_samples([spec], tmp_path / "cache")[0]) > 0
    other = write_tokens(counting_documents(39), "other")
    for suffix in (".idx", ".bin"):
        if replaced == "gone":
            Path(prefix + suffix).unlink()
        elif replaced in (suffix, "both"):
            Path(other + suffix).replace(prefix + suffix)
    with pytest.raises(DataError, match="replaced since they were checked"):
        datasets.build_samples([spec], tmp_path / "cache")


@pytest.mark.parametrize("dtype", [numpy.int16, numpy.int32])
def test_negative_ids_are_outside_every_vocabulary(tmp_path: Path, dtype: type) -> None:
    """Read as unsigned, -1 of two bytes would be 65,535 and known to a large vocabulary."""
    builder = datasets.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    builder.add_document(numpy.array([1, 2, -1, 4] * 20), [80])
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(DataError, match="-1: token id outside"):
        plan(Vocabulary(70_000), data_path=(str(tmp_path / "a"),), split="1", eval_iters=0)


@pytest.mark.parametrize("suffix", ["document_index.npy", "sample_index.npy", "shuffle_index.npy"])
def test_a_damaged_index_of_samples_is_made_again(
    write_tokens: WriteTokens, tmp_path: Path, suffix: str
) -> None:
    """megatron-core would read other tokens by it, or fail in the middle of a run."""
    prefix, cache = write_tokens(counting_documents(40)), tmp_path / "cache"
    (row,) = plan(data_path=(prefix,), split="1", eval_iters=0).rows
    request = DataRequest(
        seq_length=16, global_batch_size=4, train_iters=1, vocabulary=Vocabulary(100)
    )
    spec = row.spec(request)

    def samples() -> list[list[int]]:
        (dataset,) = datasets.build_samples([spec], cache)
        return [dataset[number].tolist() for number in range(0, len(dataset), 40)]

    expected = samples()
    (path,) = cache.glob(f"*{suffix}")
    original, made = path.read_bytes(), path.stat().st_mtime_ns
    assert samples() == expected and path.stat().st_mtime_ns == made, "it is not made each time"
    for _, content in mutations(original, 5, seed=len(suffix)):
        path.unlink()
        path.write_bytes(content)
        assert datasets.sample_cache.is_whole(cache, spec.index_sha256) is False
        assert samples() == expected
        assert path.read_bytes() == original
