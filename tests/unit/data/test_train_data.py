"""Training batches: the same order on every layout, resumable, packed, checked."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from megatron_kvshare.config import DataConfig
from megatron_kvshare.data import train_data
from megatron_kvshare.data.data_plan import DataRequest
from megatron_kvshare.data.mock import MockSamples
from megatron_kvshare.data.train_data import Batch, RankShare, TrainData
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.errors import DataError
from megatron_kvshare.megatron_api.datasets import IndexedDatasetBuilder, stock_dataset

from .conftest import WriteTokens, counting_documents

SEQ = 16
GLOBAL = 8


def build(
    prefix: str | tuple[str, ...] = "",
    share: RankShare | None = None,
    request: dict[str, object] | None = None,
    **settings: object,
) -> TrainData:
    paths = (prefix,) if isinstance(prefix, str) else prefix
    if prefix:
        settings = {"data_path": paths, "split": "80,20,0", **settings}
    asked = {"seq_length": SEQ, "global_batch_size": GLOBAL, "train_iters": 20, "eval_iters": 2}
    asked |= {"vocabulary": Vocabulary(100, eod=99), **(request or {})}
    return train_data.build(DataConfig(**settings), DataRequest(**asked), share)


def tokens_of(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in batches])


def steps(data: TrainData, number: int, consumed: int = 0, share: RankShare | None = None):
    share = share or RankShare()
    per_step = GLOBAL // (share.micro_batch_size * share.dp_size)
    return list(islice(data.train_batches(consumed), number * per_step))


def test_labels_follow_tokens_and_all_come_from_the_documents(write_tokens: WriteTokens) -> None:
    documents = counting_documents(40)
    data = build(write_tokens(documents))
    followers = {(a, b) for d in documents for a, b in pairwise(d)}
    for batch in steps(data, 5):
        assert batch.tokens.shape == batch.labels.shape == (1, SEQ)
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        assert torch.equal(batch.loss_mask, torch.ones(1, SEQ))
        assert batch.position_ids is None and batch.document_ids is None
        pairs = zip(batch.tokens[0].tolist(), batch.labels[0].tolist(), strict=True)
        assert all(pair in followers or pair[0] == 99 for pair in pairs)


def test_one_round_visits_every_sample_once(write_tokens: WriteTokens) -> None:
    """A source that is large enough is read without replacement, in another order each round."""
    data = build(
        write_tokens([list(range(98)) * 250, [99]]), split="1,0,0", request={"eval_iters": 0}
    )
    (stream,) = data._streams[train_data.DataPart.train].streams
    size = len(stream.sources[0])
    assert size == (98 * 250 + 1 - 1) // SEQ
    rounds = [[stream.locate(i)[1] for i in range(r * size, (r + 1) * size)] for r in range(3)]
    assert all(sorted(order) == list(range(size)) for order in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_global_batch_is_the_same_on_every_layout(
    write_tokens: WriteTokens, dp_size: int, micro_batch_size: int
) -> None:
    prefix = write_tokens(counting_documents(60))
    whole = tokens_of(steps(build(prefix), 3)).view(3, GLOBAL, SEQ)
    parts = []
    for rank in range(dp_size):
        share = RankShare(micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)
        batches = steps(build(prefix, share), 3, share=share)
        parts.append(tokens_of(batches).view(3, GLOBAL // dp_size, SEQ))
    for step in range(3):
        rows = torch.cat([part[step] for part in parts]).tolist()
        assert Counter(map(tuple, rows)) == Counter(map(tuple, whole[step].tolist()))


def test_resume_continues_where_the_run_stopped(write_tokens: WriteTokens) -> None:
    prefix = write_tokens(counting_documents(60))
    through = tokens_of(steps(build(prefix), 9))
    longer = build(prefix, request={"train_iters": 5000})
    assert torch.equal(tokens_of(steps(longer, 4, consumed=5 * GLOBAL)), through[5 * GLOBAL :])


def test_loader_processes_change_nothing(write_tokens: WriteTokens) -> None:
    prefix = write_tokens(counting_documents(60))
    before = torch.get_rng_state()
    plain, loaded = (tokens_of(steps(build(prefix, num_workers=n), 2)) for n in (0, 1))
    assert torch.equal(plain, loaded)
    assert torch.equal(before, torch.get_rng_state())


def test_seed_and_split_decide_the_samples(write_tokens: WriteTokens) -> None:
    prefix = write_tokens([[i] * SEQ * 4 for i in range(50)])
    data = build(prefix)
    train, valid = tokens_of(steps(data, 20)), tokens_of(list(data.valid_batches()))
    assert not set(train.unique().tolist()) & set(valid.unique().tolist())
    assert set(valid.unique().tolist()) <= set(range(40, 50))
    assert not torch.equal(train, tokens_of(steps(build(prefix, request={"seed": 1}), 20)))


def test_every_evaluation_reads_the_same_samples(write_tokens: WriteTokens) -> None:
    data = build(write_tokens(counting_documents(60)))
    first, second = (tokens_of(list(data.valid_batches())) for _ in range(2))
    assert first.shape == (2 * GLOBAL, SEQ)
    assert torch.equal(first, second)


def test_packed_documents(write_tokens: WriteTokens) -> None:
    data = build(
        write_tokens(counting_documents(60, length=5)),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    for batch in steps(data, 4):
        document = position = 0
        for column, token in enumerate(batch.tokens[0].tolist()):
            assert batch.document_ids[0, column] == document
            assert batch.position_ids[0, column] == position
            assert batch.loss_mask[0, column] == (token != 99)
            position += 1
            if token == 99:
                document, position = document + 1, 0


def test_packing_agrees_with_megatron() -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from megatron_kvshare.data.packing import document_ids, position_ids

    tokens = torch.randint(0, 4, (5, 40), generator=torch.Generator().manual_seed(0))
    ids, positions = document_ids(tokens, 3), position_ids(tokens, 3)
    for row in range(5):
        mask, _, stock = _get_ltor_masks_and_position_ids(tokens[row], 3, True, True, True, True)
        seen = (ids[row][:, None] == ids[row][None]).tril()
        assert torch.equal(seen, ~mask[0])
        assert torch.equal(positions[row], stock)


def test_blend_shares(write_tokens: WriteTokens) -> None:
    first = write_tokens([[1] * 500] * 10, "first")
    second = write_tokens([[2] * 5000] * 10, "second")
    weighted = build(("3", first, "1", second))
    share = (tokens_of(steps(weighted, 25))[:, 0] == 1).float().mean()
    assert share == 0.75
    by_size = build((first, second))
    share = (tokens_of(steps(by_size, 22))[:, 0] == 1).float().mean()
    assert 0.06 < share < 0.12
    assert [round(row.weight, 3) for row in by_size.plan.rows] == [0.091, 0.909] * 2
    rows = weighted.plan.rows[:2]
    assert [row.samples for row in rows] == [120, 40]
    assert rows[0].epochs == pytest.approx(120 * SEQ / 4000)


def test_separate_paths(write_tokens: WriteTokens) -> None:
    train, valid = write_tokens([[1] * 99], "train"), write_tokens([[2] * 99], "valid")
    data = build(train_data_path=(train,), valid_data_path=("1", valid))
    assert set(tokens_of(steps(data, 2)).unique().tolist()) == {1}
    assert set(tokens_of(list(data.valid_batches())).unique().tolist()) == {2}


def test_a_corpus_shorter_than_a_sequence_is_repeated(write_tokens: WriteTokens) -> None:
    data = build(write_tokens([[1, 2], [3, 99]]), split="1,1,0")
    assert set(tokens_of(steps(data, 1)).unique().tolist()) == {1, 2}


def test_new_files_under_an_old_name_get_a_new_index(write_tokens: WriteTokens) -> None:
    prefix = write_tokens([[1] * 200] * 10)
    steps(build(prefix), 1)
    write_tokens([[2] * 30] * 10)
    assert set(tokens_of(steps(build(prefix), 4)).unique().tolist()) == {2}


def test_index_files_are_complete_and_reused(write_tokens: WriteTokens, tmp_path: Path) -> None:
    prefix, cache = write_tokens(counting_documents(20)), tmp_path / "cache"
    build(prefix, data_cache_path=str(cache))
    files = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(files) == 10
    (cache / sorted(files)[0]).unlink()  # the description: the rest is no longer a complete index
    again = build(prefix, data_cache_path=str(cache))
    assert {file.name for file in cache.iterdir()} == set(files)
    kept = [name for name in files if (cache / name).stat().st_mtime_ns == files[name]]
    assert len(kept) == 5
    assert torch.equal(tokens_of(steps(again, 2)), tokens_of(steps(build(prefix), 2)))


def test_an_unwritable_cache_is_named(write_tokens: WriteTokens, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--data-cache-path"):
        build(write_tokens(counting_documents(20)), data_cache_path=str(tmp_path / "file" / "x"))


def test_mock_data() -> None:
    data = build(mock_data=True)
    first, second = (tokens_of(steps(build(mock_data=True), 3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.max() < 100 and first.unique().numel() > 20
    assert not torch.equal(first[:16], tokens_of(list(data.valid_batches())))
    assert "mock" in data.plan.lines()[0]
    sample = MockSamples(4, SEQ, 100, 99, seed=0)[1]
    assert sample.shape == (SEQ + 1,)


def test_the_plan_shows_every_source(write_tokens: WriteTokens) -> None:
    data = build(write_tokens(counting_documents(50)))
    header, train, valid, *_ = data.plan.lines()
    assert header.split() == [
        "part",
        "weight",
        "documents",
        "tokens",
        "samples",
        "reads",
        "epochs",
        "source",
    ]
    assert train.split()[:3] == ["train", "1.000", "40"]
    assert valid.split()[0] == "valid" and valid.split()[4] == "16"


def test_a_batch_is_what_megatron_makes_of_the_same_samples(write_tokens: WriteTokens) -> None:
    """Its own dataset in torch's loader, with its masks and positions."""
    cache = write_tokens(counting_documents(60)) + "-cache"
    data = build(cache.removesuffix("-cache"), RankShare(micro_batch_size=4), data_cache_path=cache)
    stock = stock_dataset(data.plan.rows[0].spec(data.plan.request), cache)
    share = RankShare(micro_batch_size=4)
    for batch, theirs in zip(steps(data, 20, share=share), DataLoader(stock, 4), strict=False):
        for name in ("tokens", "labels", "loss_mask"):
            ours = getattr(batch, name)
            assert torch.equal(ours, theirs[name]) and ours.dtype == theirs[name].dtype
            assert ours.is_contiguous()


def test_vocabulary_is_also_checked_while_reading(
    write_tokens: WriteTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are only sampled before training."""
    monkeypatch.setattr("megatron_kvshare.data.token_files._SCAN_TOKENS", 64)
    documents = [[1] * 500 for _ in range(4)]
    documents[0][250] = 120
    data = build(write_tokens(documents, vocab_size=200), split="1,0,0", request={"eval_iters": 0})
    with pytest.raises(DataError, match=r"120.*outside the vocabulary of 100"):
        steps(data, 100)


@pytest.mark.parametrize("token", [-1, -2])
def test_negative_ids_are_found_while_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    """megatron-core takes -1 for padding: it would be trained on as 0, without a loss."""
    monkeypatch.setattr("megatron_kvshare.data.token_files._SCAN_TOKENS", 64)
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"))
    for number in range(4):
        ids = numpy.ones(500)
        ids[250] = token if number == 0 else 1
        builder.add_document(ids, [500])
    builder.finalize(str(tmp_path / "a.idx"))
    data = build(str(tmp_path / "a"), split="1,0,0", request={"eval_iters": 0})
    with pytest.raises(DataError, match=rf"{token}: token id outside"):
        steps(data, 100)
