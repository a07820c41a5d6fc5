"""Keys and values on their way between layers (L3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch


class KV(NamedTuple):
    """One producer's rotated keys and its values, each ``[s, b, g, d]`` over the full sequence."""

    key: torch.Tensor
    value: torch.Tensor

    def zeros_like(self) -> KV:
        return KV(torch.zeros_like(self.key), torch.zeros_like(self.value))


KVBundle = Mapping[int, KV]
"""Producer layer -> its keys and values, for one microbatch."""


def residual(new: KVBundle, old: KVBundle, targets: Iterable[int]) -> torch.Tensor:
    """``[||KV_n - KV_{n-1}||^2, ||KV_n||^2]`` over ``targets``, fp64 sums of this rank's heads.

    A target that ``old`` lacks counts as zero: that is what the first pass reads.
    """
    change = total = 0.0
    for layer in targets:
        for now, before in zip(new[layer], old.get(layer) or new[layer].zeros_like(), strict=True):
            change = change + (now.detach() - before.detach()).double().square().sum()
            total = total + now.detach().double().square().sum()
    return torch.stack((torch.as_tensor(change), torch.as_tensor(total)))
