"""Decoding steps of a GPU, recorded once for each size of batch and replayed: a step is hundreds of
small kernels, and to launch them one by one takes longer than they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_kvshare.kernels.paged_attention import PageRows, PageTable


class DecodeInputs(NamedTuple):
    """One new token of each sequence, as tensors: ``ids`` ``[b, 1]``, ``positions`` and ``slots``
    (the place in a page) ``[b]``; of every group of the cache the ``pages`` ``[b]`` that are
    written and the ``tables`` that are read."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    pages: tuple[torch.Tensor, ...]
    tables: tuple[PageTable, ...]


Decode = Callable[[DecodeInputs], torch.Tensor]
Record = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]
"""Records a function of tensors that stay where they are: its result, and what makes it anew."""


class Recorded(NamedTuple):
    inputs: DecodeInputs
    logits: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """``widths``: pages of a sequence at most, in each group of the cache. A batch that lies
    between two sizes is filled up with copies of its first sequence, which write what it writes."""

    def __init__(
        self, decode: Decode, most: int, widths: tuple[int, ...], record: Record | None = None
    ) -> None:
        self.decode = decode
        self.sizes = graph_sizes(most)
        self.widths = widths
        self.record = record or record_on_gpu()
        self._recorded: dict[int, Recorded] = {}

    def __call__(self, inputs: DecodeInputs) -> torch.Tensor:
        """Logits ``[b, vocab]``, as ``decode`` gives them."""
        count = len(inputs.ids)
        size = next(size for size in self.sizes if size >= count)
        filled = self._filled(inputs, size)
        recorded = self._recorded.get(size)
        if recorded is None:
            logits, replay = self.record(lambda: self.decode(filled))
            recorded = self._recorded[size] = Recorded(filled, logits, replay)
        else:
            for ours, new in zip(_tensors(recorded.inputs), _tensors(filled), strict=True):
                ours.copy_(new)
        recorded.replay()
        return recorded.logits[:count].clone()

    def _filled(self, inputs: DecodeInputs, size: int) -> DecodeInputs:
        def fill(x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x, x[:1].expand(size - len(x), *x.shape[1:])))

        def widened(table: PageTable, width: int) -> PageRows:
            assert isinstance(table, PageRows), "graphs read pages by the table"
            return PageRows(fill(F.pad(table.ids, (0, width - table.ids.shape[1]))))

        pairs = zip(inputs.tables, self.widths, strict=True)
        return DecodeInputs(
            fill(inputs.ids),
            fill(inputs.positions),
            fill(inputs.slots),
            tuple(map(fill, inputs.pages)),
            tuple(widened(table, width) for table, width in pairs),
        )


def graph_sizes(most: int) -> list[int]:
    """Batches that are recorded: 1, 2, 4, 8 and every multiple of 8 above, and ``most``."""
    sizes = {size for size in (1, 2, 4, *range(8, most, 8)) if size < most}
    return sorted({*sizes, most})


def record_on_gpu() -> Record:
    """Records CUDA graphs that share one pool of memory: one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(
        run: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # libraries set themselves up at the first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = run()
        return logits, graph.replay

    return record


def _tensors(inputs: DecodeInputs) -> list[torch.Tensor]:
    tables = [table.ids for table in inputs.tables if isinstance(table, PageRows)]
    return [inputs.ids, inputs.positions, inputs.slots, *inputs.pages, *tables]
