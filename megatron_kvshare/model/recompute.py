"""Activation recomputation: which layers keep only their input, and are run again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.sharing.plan import LayerStep

P = ParamSpec("P")
R = TypeVar("R")


def recomputed(function: Callable[P, R], wanted: bool = True) -> Callable[P, R]:
    """``function``, run again in backward instead of keeping its activations.

    What it reads must not change after it has run.
    """
    if not wanted or not torch.is_grad_enabled():
        return function
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class RecomputePolicy(NamedTuple):
    """Which layers of a stage are recomputed in backward (``--recompute-granularity full``), in
    which chunks: those below layer ``stop``."""

    layers_per_chunk: int
    stop: int

    @classmethod
    def of(cls, model: ModelConfig, layers: range) -> RecomputePolicy:
        """As in Megatron, ``--recompute-num-layers`` counts in each stage."""
        if model.recompute_granularity != "full":
            return cls(len(layers), layers.start)
        if model.recompute_method == "block":
            return cls(1, layers.start + (model.recompute_num_layers or len(layers)))
        return cls(model.recompute_num_layers or 1, layers.stop)

    def includes(self, step: LayerStep) -> bool:
        return step.layer < self.stop

    def chunks(self, steps: tuple[LayerStep, ...]) -> Iterator[tuple[tuple[LayerStep, ...], bool]]:
        """Consecutive steps that run as one unit, and whether that unit is recomputed."""
        inside = [step for step in steps if self.includes(step)]
        for start in range(0, len(inside), self.layers_per_chunk):
            yield tuple(inside[start : start + self.layers_per_chunk]), True
        if len(inside) < len(steps):
            yield steps[len(inside) :], False
