"""Borders of packed documents inside a sequence.

An end-of-document token belongs to the document it ends, as in megatron-core: the next token starts
a new one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(tokens: Tensor, eod: int) -> Tensor:
    """Number of the document each token belongs to, from 0 in every sequence.

    Args:
        tokens: ids, ``[b, s]`` int64.
        eod: end-of-document token.

    Returns:
        ``[b, s]`` int64, never falling along ``s``.
    """
    ends = (tokens == eod).long()
    return ends.cumsum(dim=1) - ends


def position_ids(tokens: Tensor, eod: int) -> Tensor:
    """Distance of each token from the start of its document, ``[b, s]`` int64."""
    index = torch.arange(tokens.size(1)).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(tokens[:, :-1] == eod, index[:, 1:], 0)
    return index - starts.cummax(dim=1).values
