"""Token files and samples through megatron-core's datasets.

The only module that imports ``megatron.core.datasets``. Checks belong to the ``data`` package: what
is called here has been found sound before, because the stock classes answer bad input with endless
loops or bare asserts.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split, normalize
from torch import Tensor, distributed

from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.megatron_api import sample_cache


class DataPart(IntEnum):
    """What a piece of the data is for; the numbers are megatron-core's."""

    train = Split.train.value
    valid = Split.valid.value
    test = Split.test.value


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """Everything that decides the order of samples of one part of one source.

    ``documents`` is the range ``[first, end)`` of documents in the token files at ``prefix``;
    ``min_samples`` asks for as many epochs in the index as that many samples need (None: one
    epoch). ``fingerprint`` and ``index_sha256`` name the content of ``.bin`` and ``.idx``: an index
    of samples made for other content is never read, nor are files that have changed since they were
    checked.
    """

    prefix: str
    part: DataPart
    documents: tuple[int, int]
    min_samples: int | None
    seq_length: int
    seed: int
    fingerprint: str
    index_sha256: str


class _IndexKey:
    """Stands in for a tokenizer in the stock configuration.

    The stock index file name hashes the tokenizer's ``unique_identifiers``: the right place for the
    fingerprint of the files and for the document range. There is no ``pad`` on purpose: no token of
    the data is padding.
    """

    eod = None
    vocab_size = None

    def __init__(self, spec: PartSpec) -> None:
        self.unique_identifiers = {"data": spec.fingerprint, "documents": list(spec.documents)}
        self.unique_identifiers["index"] = spec.index_sha256
        self.unique_identifiers["samples"] = [spec.min_samples or 0]


class TokenFileWriter:
    """Writes stock ``.bin/.idx`` files, one sequence per document, with the stock builder.

    Args:
        bin_path: file for the token ids.
        vocab_size: decides the width of a token id (2 bytes below 65,500, else 4), as megatron-core
            does.
    """

    def __init__(self, bin_path: Path, vocab_size: int) -> None:
        self.dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(str(bin_path), dtype=self.dtype)

    def add_document(self, token_ids: numpy.ndarray) -> None:
        """Append one document (1-D integer array)."""
        self._builder.add_document(token_ids, [int(token_ids.size)])

    def finalize(self, idx_path: Path) -> None:
        """Close the token file and write the index file."""
        self._builder.finalize(str(idx_path))

    def close(self) -> None:
        """Close the token file without an index (the files are given up)."""
        self._builder.data_file.close()


def split_ranges(shares: Sequence[float], num_documents: int) -> dict[DataPart, tuple[int, int]]:
    """Which documents ``--split`` gives to each part, by megatron-core's own rounding.

    Args:
        shares: one to three numbers of at least 0 with a positive sum, such as 969, 30, 1.
        num_documents: documents in the source.

    Returns:
        ``[first, end)`` per part; ``first == end`` for a part without documents.
    """
    padded = [*shares, *[0.0] * (len(DataPart) - len(shares))]
    matrix = convert_split_vector_to_split_matrix(normalize(padded))
    ranges = {}
    for part in DataPart:
        start, stop = matrix[part] or (0.0, 0.0)
        ranges[part] = (round(start * float(num_documents)), round(stop * float(num_documents)))
    return ranges


def blend_pattern(weights: list[float], size: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """megatron-core's order of blended sources: which source each of ``size`` picks takes.

    Returns:
        The source of each pick (int16) and how many picks of that source came before (int64).
    """
    source = numpy.zeros(size, dtype=numpy.int16)
    earlier = numpy.zeros(size, dtype=numpy.int64)
    normalized = numpy.array(weights, dtype=numpy.float64) / sum(weights)
    helpers.build_blending_indices(source, earlier, normalized, len(weights), size, False)
    return source, earlier


class TokenSamples:
    """The samples of a stock ``dataset``, each as the ``seq_length + 1`` ids that tokens and labels
    are cut from.

    What the stock class makes of them, one sample at a time, is made of whole batches here; and it
    takes ids of -1 for padding, which it turns into 0.
    """

    def __init__(self, dataset: GPTDataset) -> None:
        self._dataset = dataset
        for name in ("document_index", "sample_index", "shuffle_index"):
            # The same memory, without what numpy.memmap does at every look-up.
            setattr(dataset, name, getattr(dataset, name).view(numpy.ndarray))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Tensor:
        """Ids of sample ``index``, ``[s + 1]`` int64."""
        # Later versions return more than ids and documents.
        return torch.from_numpy(self._dataset._query_document_sample_shuffle_indices(index)[0])


def build_samples(specs: list[PartSpec], cache: Path) -> list[TokenSamples]:
    """The samples of each spec by a stock :class:`GPTDataset`, with its index cached in ``cache``.

    All ranks call this together. Rank 0 makes what is missing, then the others map the same files.
    Index files appear complete or not at all, so several runs may share the folder and a killed run
    leaves nothing broken. A rank that does not see rank 0's disk makes the index in its own memory.

    Raises:
        DataError: on every rank, if the cache folder cannot be written or the files have changed
            since they were checked.
    """
    fault = None
    needed = {spec.index_sha256 for spec in specs}
    if _rank() == 0:
        try:
            sample_cache.fill(
                lambda folder: [stock_dataset(spec, folder) for spec in specs], cache, needed
            )
        except OSError as error:
            fault = Fault(
                where="--data-cache-path",
                value=str(cache),
                rule=f"the index of samples cannot be written there ({error})",
                fix="pass a folder that can be written",
            )
        except DataError as error:
            fault = error.faults[0]
    fault = _from_rank_zero(fault)
    if fault is not None:
        raise DataError(fault)
    whole = {data: sample_cache.is_whole(cache, data) for data in needed}
    return [TokenSamples(_cached_dataset(spec, cache, whole[spec.index_sha256])) for spec in specs]


def stock_dataset(spec: PartSpec, cache: str) -> GPTDataset:
    """megatron-core's own dataset; ``cache``: the folder with its index, or for it."""
    config = GPTDatasetConfig(
        random_seed=spec.seed,
        sequence_length=spec.seq_length,
        blend=([spec.prefix], None),
        split=",".join("1" if part == spec.part else "0" for part in DataPart),
        path_to_cache=cache,
        tokenizer=_IndexKey(spec),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = numpy.arange(*spec.documents, dtype=numpy.int32)
    source = _opened_as_checked(spec, config)
    part = Split(int(spec.part))
    return GPTDataset(source, spec.prefix, documents, spec.min_samples, part, config)


def _opened_as_checked(spec: PartSpec, config: GPTDatasetConfig) -> IndexedDataset:
    """megatron-core's reader of the files that were checked, and of no others.

    It opens them by name once more; ``kvshare preprocess`` may have replaced them in between. It
    keeps both files open, and takes the tokens first, as preprocess does the other way round: with
    the index that was checked, they are the ones that were checked.
    """
    source = None
    if IndexedDataset.exists(spec.prefix):
        source = GPTDataset.build_low_level_dataset(spec.prefix, config)
    if source is None or hashlib.sha256(source.index.bin_buffer).hexdigest() != spec.index_sha256:
        rule = "the files have been replaced since they were checked, moments ago"
        fix = "start again when nothing writes to them"
        raise DataError(Fault("token files", spec.prefix, rule, fix))
    return source


def _cached_dataset(spec: PartSpec, cache: Path, is_whole: bool) -> GPTDataset:
    """A rank may see another disk than rank 0's, or a damaged file there: not ``is_whole``."""
    if is_whole:
        with contextlib.suppress(FileNotFoundError):
            return stock_dataset(spec, str(cache))
    return stock_dataset(
        spec, ""
    )  # the stock class keeps the index in memory when the folder is ""


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _from_rank_zero(fault: Fault | None) -> Fault | None:
    """Rank 0's value on every rank; also the point where the others wait for rank 0."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return fault
    shared = [fault]
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    distributed.broadcast_object_list(shared, src=0, device=device)
    return shared[0]
