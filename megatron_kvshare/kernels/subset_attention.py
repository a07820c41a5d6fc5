"""Attention of one interleaved token subset over all known keys, as one kernel: FlexAttention.

Keys lie in group order: those of tokens ``0::stride`` first, then ``1::stride``, as many subsets as
are known. What a query sees is no triangle in that order, but each pair of blocks of 128 queries
and 128 keys is seen as a whole, in part or not at all; only those seen in part are masked.

A mask has no numbers of its own: what it compares are tensors, so that torch compiles one kernel
for all strides and offsets. Past its limit of compilations torch would compute full scores without
a word; with ``fullgraph`` that is an error. FlexAttention has no backward on CPUs.
"""

from __future__ import annotations

import functools

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_kvshare.errors import ConfigError, Fault

Tensor = torch.Tensor

BLOCK = 128
"""Queries and keys of a block: what FlexAttention's kernels are made for."""


@functools.cache
def _kernel() -> type[flex_attention]:
    return torch.compile(flex_attention, fullgraph=True)


def attend_subset(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """``[b, n, q, d]`` queries over ``[b, g, k, d]`` keys; a query that sees nothing gives 0.

    Raises:
        ConfigError: there are more kinds of shapes than torch compiles kernels for.
    """
    is_grouped = query.shape[1] != key.shape[1]
    try:
        return _kernel()(query, key, value, block_mask=mask, enable_gqa=is_grouped)
    except FailOnRecompileLimitHit as error:
        shapes = f"queries {tuple(query.shape)}, keys {tuple(key.shape)}"
        rule = "torch has compiled as many kernels for other shapes as it is allowed to"
        fix = "read token subsets without it: --no-flex-attention"
        raise ConfigError(Fault("--flex-attention", shapes, rule, fix)) from error


@functools.lru_cache(maxsize=256)
def subset_mask(
    length: int, stride: int, offset: int, strict: bool, known: int, device: torch.device
) -> BlockMask:
    """What tokens ``offset::stride`` of ``length`` see of the first ``known`` subsets: tokens
    earlier than themselves, and themselves unless ``strict``. Made once for all forwards."""
    tokens = torch.arange(length, dtype=torch.int32, device=device)
    keys = torch.cat([tokens[subset::stride] for subset in range(known)])
    ends = tokens[offset::stride] + (0 if strict else 1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return keys[key] < ends[query]

    first_key, last_key = _extremes(keys)
    first_end, last_end = _extremes(ends)
    seen = first_key < last_end[:, None]
    # A block at the end that is not full is never taken without a mask.
    whole = (_is_whole(ends)[:, None] & _is_whole(keys)) & (last_key < first_end[:, None])
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(ends), len(keys)),
    )


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of each block."""
    blocks = x.split(BLOCK)
    return torch.stack([b.min() for b in blocks]), torch.stack([b.max() for b in blocks])


def _is_whole(x: Tensor) -> Tensor:
    starts = torch.arange(0, len(x), BLOCK, device=x.device)
    return starts + BLOCK <= len(x)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and which, those first: ``[1, 1, q, k]``."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
