"""Several ranks open data together: one index for all, or the same error on all."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from tests.distributed.world import Layout, World


def first_tokens(state, layout: Layout, prefix: str, cache: str) -> object:
    """Tokens of the first micro-batch of this rank, or which flag was wrong."""
    from megatron_kvshare.config import DataConfig
    from megatron_kvshare.data.data_plan import DataRequest
    from megatron_kvshare.data.train_data import RankShare, build
    from megatron_kvshare.data.vocabulary import Vocabulary
    from megatron_kvshare.errors import DataError

    request = DataRequest(
        seq_length=16, global_batch_size=4, train_iters=9, vocabulary=Vocabulary(100)
    )
    config = DataConfig(data_path=(prefix,), split="1,0,0", data_cache_path=cache)
    share = RankShare(dp_rank=state.dp_rank, dp_size=state.dp_size)
    try:
        data = build(config, request, share)
    except DataError as error:
        return error.faults[0].where
    return next(data.train_batches()).tokens[0].tolist()


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    from megatron_kvshare.megatron_api.datasets import TokenFileWriter

    writer = TokenFileWriter(tmp_path / "data.bin", 100)
    for start in range(30):
        writer.add_document(numpy.arange(start, start + 40))
    writer.finalize(tmp_path / "data.idx")
    return str(tmp_path / "data")


def test_ranks_read_their_share_of_one_order(world: World, prefix: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (alone,) = world.run(first_tokens, Layout(), prefix, str(tmp_path / "other"))
    ranks = world.run(first_tokens, Layout(tensor=2, data=2), prefix, str(cache))
    assert ranks[0] == ranks[1] == alone
    assert ranks[2] == ranks[3] != alone
    assert len(list(cache.iterdir())) == 5


def test_an_unwritable_cache_is_an_error_on_every_rank(
    world: World, prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    blocked = str(tmp_path / "file" / "cache")
    ranks = world.run(first_tokens, Layout(data=2), prefix, blocked)
    assert ranks == ["--data-cache-path"] * 2
