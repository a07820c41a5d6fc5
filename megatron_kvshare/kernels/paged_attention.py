"""Attention of one token per sequence over keys and values that lie in pages.

A pool holds pages of ``page_size`` tokens, in any order; a table says which pages a sequence has.
Nothing is copied: on GPUs torch's varlen kernel follows the table; elsewhere **the pages are the
batch** of two batched matrix products over the pool as it lies there, each page with the query of
the sequence that owns it, and the parts of a sequence are added up.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import NamedTuple

import torch

from megatron_kvshare.kernels import choice

Tensor = torch.Tensor
_FLOOR = -1e30


class PageRows(NamedTuple):
    """The pages of ``b`` sequences, in the order of their tokens, for the kernel of GPUs:
    ``ids`` int32 ``[b, most pages]``."""

    ids: Tensor


class PageList(NamedTuple):
    """The pages of ``b`` sequences, for products over pages. ``pages`` says which of the pool the
    arrays below are about: a slice of it, or ids ``[p]``.

    ``owner`` ``[p]``: the sequence, by its place in the batch; ``first`` ``[p]``: the position of
    the page's first token, beyond every limit for a page that nobody reads.
    """

    pages: slice | Tensor
    owner: Tensor
    first: Tensor


PageTable = PageRows | PageList


class Limits(NamedTuple):
    """What the query of each sequence sees, for the kernel of GPUs: positions below ``limit`` int32
    ``[b]``, the last ``window`` of them (None: all)."""

    limit: Tensor
    window: int | None


Reach = Limits | Tensor
"""The same for products over pages: a mask ``[p * g, 1, page_size]``, 0 or -inf."""


class PagedKV(NamedTuple):
    """Keys and values of one producer, each ``[pages, page_size, g, d]``, and who reads them."""

    key: Tensor
    value: Tensor
    table: PageTable
    reach: Reach


def reach(table: PageTable, limit: Tensor, window: int | None, pool: Tensor) -> Reach:
    """``limit`` ``[b]``: one more than the last position that a sequence's query sees; ``window``:
    how many positions up to there it sees at most; ``pool``: keys ``[pages, page_size, g, d]``."""
    if isinstance(table, PageRows):
        return Limits(limit.int(), window)
    _, page_size, groups, _ = pool.shape
    position = table.first[:, None] + torch.arange(page_size, device=limit.device)
    last = limit[table.owner][:, None]
    hidden = position >= last
    if window is not None:
        hidden |= position < last - window
    mask = torch.zeros(position.shape, device=limit.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(groups, dim=0)[:, None]


def attend_pages(query: Tensor, source: PagedKV) -> Tensor:
    """``[b, n, d]`` queries, one token of each sequence -> ``[b, n, d]``; a query that sees nothing
    gives exactly 0."""
    key, value, table, seen = source
    if isinstance(table, PageRows):
        assert isinstance(seen, Limits)
        return _varlen(query, key, value, table, seen)
    assert isinstance(seen, Tensor)
    return _over_pages(query, key, value, table, seen)


def _over_pages(query: Tensor, key: Tensor, value: Tensor, table: PageList, mask: Tensor) -> Tensor:
    """The pages as a batch of products, added up for each sequence."""
    pages, owner, _ = table
    b, n, d = query.shape
    groups = key.shape[2]
    # [p * g, page_size, d]: a view where each head of a page is one block of memory
    keys, values = (x[pages].transpose(1, 2).flatten(0, 1) for x in (key, value))
    queries = query.view(b, groups, -1, d)
    grouped = queries.index_select(0, owner).flatten(0, 1)  # [p * g, n / g, d]
    if keys.dtype != torch.float32:  # scores in 16 bit would lose what matters
        grouped, keys, values = grouped.float(), keys.float(), values.float()
    scores = torch.baddbmm(mask, grouped, keys.transpose(1, 2), alpha=d**-0.5)
    highest = scores.amax(-1).view(len(owner), n)
    rows = owner[:, None].expand(-1, n)
    of_sequence = highest.new_full((b, n), _FLOOR).scatter_reduce_(0, rows, highest, "amax")
    shift = of_sequence.index_select(0, owner).view(*scores.shape[:-1], 1)
    weights = scores.sub_(shift).exp_()
    totals = weights.sum(-1).view(len(owner), n)
    total = totals.new_zeros(b, n).index_add_(0, owner, totals)
    parts = torch.bmm(weights, values).view(len(owner), n * d)
    summed = parts.new_zeros(b, n * d).index_add_(0, owner, parts).view(b, n, d)
    return (summed / total.clamp_min_(1e-30)[..., None]).to(query.dtype)


def _varlen(query: Tensor, key: Tensor, value: Tensor, table: PageRows, seen: Limits) -> Tensor:
    """FlashAttention as torch has it, on the pool and the table as they are."""
    limit, window = seen
    if window == 0:
        return torch.zeros_like(query)
    from torch.nn.attention.varlen import varlen_attn

    b = len(query)
    starts = torch.arange(b + 1, dtype=torch.int32, device=query.device)
    most = table.ids.shape[1] * key.shape[1]
    out = varlen_attn(
        query,
        key,
        value,
        starts,
        None,
        1,
        most,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[2],
        seqused_k=limit,
        block_table=table.ids,
    )
    return torch.where((limit > 0)[:, None, None], out, torch.zeros_like(out))


@cache
def _varlen_reads_pages() -> bool:
    """Whether this torch's varlen kernel knows tables of pages (from 2.12 on)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters


def has_paged_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one kernel follows the table on this device; else the pages are the batch."""
    is_flash = choice.on_gpu(device) and choice.causal_kernel(device, dtype, head_dim) is not None
    return is_flash and _varlen_reads_pages()
