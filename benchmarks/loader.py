"""Samples per second of the training loader, beside megatron-core's GPTDataset in torch's loader.

    python benchmarks/loader.py [--rounds 5] [--batches 200] [--json FILE]

Both read the same token files (made here: documents of 50 to 4,000 ids below 32,000), in the same
order, in micro-batches of 4 sequences of 2,048 tokens. The stock one is told to make no attention
mask, which is its quickest. Rounds alternate; the ratio is the median over pairs. What this loader
does besides is counted in: it blends, finds ids outside the vocabulary, and takes any number of
epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy
import torch
from torch.utils.data import DataLoader

from megatron_kvshare.config import DataConfig
from megatron_kvshare.data import train_data
from megatron_kvshare.data.data_plan import DataRequest
from megatron_kvshare.data.train_data import RankShare
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.megatron_api.datasets import TokenFileWriter, stock_dataset

SEQUENCE, MICRO_BATCH, VOCABULARY, DOCUMENTS = 2048, 4, 32_000, 8_000
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="pairs (default: 5)")
    parser.add_argument("--batches", type=int, default=200, help="per round (default: 200)")
    parser.add_argument("--json", help="write the figures to this file too")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_corpus(Path(folder))
        rows = [
            row(prefix, Path(folder), workers, words.rounds, words.batches) for workers in (0, 2)
        ]
    for each in rows:
        print(
            f"{each['workers']} loader processes: {each['samples_per_second']:,.0f} samples/s,"
            f" GPTDataset {each['stock_samples_per_second']:,.0f}, ratio {each['ratio']:.2f}"
            f" ({', '.join(f'{ratio:.2f}' for ratio in each['ratios'])})"
        )
    if words.json:
        Path(words.json).write_text(json.dumps(rows, indent=1) + "\n")


def write_corpus(folder: Path) -> str:
    random = numpy.random.default_rng(0)
    writer = TokenFileWriter(folder / "corpus.bin", VOCABULARY)
    for size in random.integers(50, 4000, DOCUMENTS):
        writer.add_document(random.integers(0, VOCABULARY, size))
    writer.finalize(folder / "corpus.idx")
    return str(folder / "corpus")


def row(prefix: str, folder: Path, workers: int, rounds: int, batches: int) -> dict[str, object]:
    config = DataConfig(
        data_path=(prefix,), split="1,0,0", num_workers=workers, data_cache_path=str(folder / "c")
    )
    request = DataRequest(
        seq_length=SEQUENCE,
        global_batch_size=MICRO_BATCH,
        train_iters=rounds * batches,
        vocabulary=Vocabulary(VOCABULARY),
    )
    data = train_data.build(config, request, RankShare(micro_batch_size=MICRO_BATCH))
    stock = stock_dataset(data.plan.rows[0].spec(request), str(folder / "c"))
    pairs = []
    for _ in range(rounds):
        ours = speed(data.train_batches(), batches)
        pairs.append((ours, speed(stock_batches(stock, workers), batches)))
    ratios = [ours / theirs for ours, theirs in pairs]
    return {
        "workers": workers,
        "samples_per_second": statistics.median(ours for ours, _ in pairs),
        "stock_samples_per_second": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def stock_batches(stock: object, workers: int) -> Iterator[object]:
    context = "fork" if workers else None
    return iter(
        DataLoader(stock, MICRO_BATCH, num_workers=workers, multiprocessing_context=context)
    )


def speed(batches: Iterable[object], count: int) -> float:
    """Samples per second, after the first batches."""
    batches = iter(batches)
    for _ in islice(batches, WARM_UP):
        pass
    start = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return count * MICRO_BATCH / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
