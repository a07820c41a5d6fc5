"""What megatron-core's optimizers hold for each weight, whichever of them it is.

The replicated optimizer holds the state of whole local weights, the distributed one that of a range
of their elements on every data-parallel rank; under bf16 both hold fp32 weights too. Checkpoints
see one thing: tensors of a range of elements, to copy from and to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_kvshare.megatron_api.platform import cpu_mode

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"


class HeldState(NamedTuple):
    """State of the elements of a local weight from ``start`` on, laid out flat.

    ``tensors``: ``exp_avg``, ``exp_avg_sq``, and ``fp32_param`` where the weight itself is not
    fp32; views of the optimizer's own memory. ``divided``: no other data-parallel rank holds them.
    """

    start: int
    tensors: dict[str, torch.Tensor]
    divided: bool


class MegatronOptimizerState:
    """The state inside ``optimizer``, of all weights that it updates."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer

    def held(self, weight: torch.nn.Parameter) -> HeldState | None:
        """What this rank holds for one of its weights; None where other data-parallel ranks hold
        it."""
        part = self._only_part
        main, start = getattr(weight, "main_param", weight), 0
        divided = isinstance(part, DistributedOptimizer)
        if divided:
            if weight not in part.model_param_group_index_map:
                return None
            group, place = part.model_param_group_index_map[weight]
            main = part.optimizer.param_groups[group]["params"][place]
            start = part._get_model_param_range_map(weight)["param"].start
        state = part.optimizer.state[main]
        for name in MOMENTS:
            if name not in state:  # Transformer Engine's and apex's AdamW make it at the first step
                state[name] = torch.zeros_like(main, dtype=torch.float32)
        tensors = {name: state[name] for name in MOMENTS}
        if weight.dtype != torch.float32:
            tensors[MAIN] = main
        flat = {name: tensor.detach().view(-1) for name, tensor in tensors.items()}
        return HeldState(start, flat, divided)

    @property
    def updates(self) -> int:
        """How many updates the state has seen; 0 on a rank that holds none."""
        counts = {int(owner["step"]) for owner in self._counters()}
        assert len(counts) <= 1, "all weights are updated in every step"
        return counts.pop() if counts else 0

    def set_updates(self, count: int) -> None:
        """Continue counting at ``count``."""
        for owner in self._counters():
            if isinstance(owner["step"], torch.Tensor):
                owner["step"].fill_(count)
            else:
                owner["step"] = count
        inner = self._only_part.optimizer
        if not isinstance(inner, torch.optim.AdamW):  # counts by group, from the first step on
            for group in inner.param_groups:
                group["step"] = count

    def follow_weights(self) -> None:
        """Make the fp32 copies equal to weights that were loaded without optimizer state."""
        with cpu_mode():
            self._optimizer.reload_model_params()

    def _counters(self) -> Iterator[dict[str, Any]]:
        """Where steps are counted: torch counts by weight, others by group."""
        inner = self._only_part.optimizer
        owners: Sequence[dict[str, Any]] = [*inner.state.values(), *inner.param_groups]
        return (owner for owner in owners if "step" in owner)

    @property
    def _only_part(self) -> Any:
        """Megatron-core chains optimizers, one for dense weights and one for experts: here just
        one."""
        (part,) = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        return part
