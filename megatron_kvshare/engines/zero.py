"""What DeepSpeed's optimizers hold for each weight, whichever of them it is.

Without ZeRO every data-parallel rank holds the state of whole local weights. ZeRO 1 and 2 lay the
weights of a parameter group end to end and cut the row into as many parts as there are ranks; ZeRO
3 cuts every weight. All of them come down to one thing: which elements of a weight's are updated on
this rank, and where their fp32 values, moments and gradients are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from megatron_kvshare.megatron_api.optimizer_state import MAIN, MOMENTS, HeldState

Weight = torch.nn.Parameter


class Share(NamedTuple):
    """The ``size`` elements of a local weight from ``start`` on, which this rank updates.

    ``flat`` is what the optimizer takes for a weight, in which they begin at ``offset``.
    """

    start: int
    size: int
    flat: torch.Tensor
    offset: int

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """They, in something shaped like the local weight."""
        return weight.detach().view(-1).narrow(0, self.start, self.size)

    def of_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """They, in something shaped like ``flat``."""
        return flat.detach().view(-1).narrow(0, self.offset, self.size)


class Shares(ABC):
    """This rank's shares of ``weights``, all that train; an
    :class:`~megatron_kvshare.checkpoint.parts.OptimizerState`.

    ``zero``: DeepSpeed's optimizer, around ``adamw``.
    """

    divided = True
    """No other data-parallel rank holds the same."""

    def __init__(self, zero: Any, adamw: torch.optim.AdamW, weights: Sequence[Weight]) -> None:
        self.zero, self.adamw, self.weights = zero, adamw, weights
        for flat in self.flats():
            # Before the first step, so that it can be loaded or saved until then.
            adamw.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{name: torch.zeros_like(flat.data) for name in MOMENTS},
            }

    @abstractmethod
    def flats(self) -> Sequence[torch.Tensor]:
        """The fp32 tensors that the optimizer updates."""

    @abstractmethod
    def share(self, weight: Weight) -> Share | None:
        """This rank's share of ``weight``, None where it has none."""

    @abstractmethod
    def gradient(self, weight: Weight) -> torch.Tensor | None:
        """Of the share, flat, after the backward of a whole global batch: the memory that the
        step reads. None where there is no share."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Let the next backward find none."""

    def held(self, weight: Weight) -> HeldState | None:
        share = self.share(weight)
        if share is None:
            return None
        state = self.adamw.state[share.flat]
        tensors = {name: share.of_flat(state[name]) for name in MOMENTS}
        if weight.dtype != torch.float32:
            tensors[MAIN] = share.of_flat(share.flat)
        return HeldState(share.start, tensors, self.divided)

    @property
    def updates(self) -> int:
        return max((int(state["step"]) for state in self.adamw.state.values()), default=0)

    def set_updates(self, count: int) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def follow_weights(self) -> None:
        """To be called where the weights are whole."""
        for weight in self.weights:
            share = self.share(weight)
            if share is not None:
                share.of_flat(share.flat).copy_(share.of_weight(weight))


class WholeShares(Shares):
    """Without ZeRO, DeepSpeed's optimizer is AdamW itself."""

    divided = False

    def flats(self) -> Sequence[torch.Tensor]:
        return self.weights

    def share(self, weight: Weight) -> Share:
        return Share(0, weight.numel(), weight, 0)

    def gradient(self, weight: Weight) -> torch.Tensor | None:
        return None if weight.grad is None else weight.grad.view(-1)

    def discard_gradients(self) -> None:
        self.adamw.zero_grad()


class FragmentShares(Shares):
    """ZeRO 1 and 2: DeepSpeed tells which fragment of a weight is on this rank."""

    def flats(self) -> Sequence[torch.Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def share(self, weight: Weight) -> Share | None:
        fragment = weight._hp_mapping
        if fragment is None:
            return None
        here, there = fragment.lp_fragment_address, fragment.hp_fragment_address
        flat = self.flats()[fragment.param_group_index]
        return Share(here.start, here.numel, flat, there.start)

    def gradient(self, weight: Weight) -> torch.Tensor | None:
        fragment = weight._hp_mapping
        if fragment is None:
            return None
        return fragment.get_lp_grad_fragment(weight._index_in_param_group).view(-1)

    def discard_gradients(self) -> None:
        # As its step does when it finds an overflow.
        self.zero.zero_grad()
        self.zero.micro_step_id = -1
        if self.zero.cpu_offload:
            self.zero.reset_cpu_buffers()
        for kept in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))


class BFloat16Shares(FragmentShares):
    """ZeRO 1 in bf16 with gradients accumulated in fp32: every rank keeps those of whole
    weights."""

    def flats(self) -> Sequence[torch.Tensor]:
        return self.zero.fp32_groups_flat_partition

    def gradient(self, weight: Weight) -> torch.Tensor | None:
        whole, share = super().gradient(weight), self.share(weight)
        return None if whole is None or share is None else share.of_weight(whole)

    def discard_gradients(self) -> None:
        self.zero.clear_hp_grads()
        self.zero.clear_lp_grads()


class WeightShares(Shares):
    """ZeRO 3: every weight is cut into as many parts as there are ranks; the last are padded."""

    def __init__(self, zero: Any, adamw: torch.optim.AdamW, weights: Sequence[Weight]) -> None:
        super().__init__(zero, adamw, weights)
        self._places = {
            weight: (group, place)
            for group, of_group in enumerate(zero.fp16_groups)
            for place, weight in enumerate(of_group)
        }

    def flats(self) -> Sequence[torch.Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def share(self, weight: Weight) -> Share | None:
        group, offset, size = self.zero.grad_position[self.zero.get_param_id(weight)]
        start = size * torch.distributed.get_rank(weight.ds_process_group)
        size = min(size, weight.ds_numel - start)
        return Share(start, size, self.flats()[group], offset) if size > 0 else None

    def gradient(self, weight: Weight) -> torch.Tensor | None:
        share = self.share(weight)
        if share is None:
            return None
        if self.zero.offload_optimizer:  # in the memory of the host, beside the fp32 weights
            return None if share.flat.grad is None else share.of_flat(share.flat.grad)
        group, place = self._places[weight]
        return self.zero.averaged_gradients[group][place].view(-1)[: share.size]

    def discard_gradients(self) -> None:
        # As its step does when it finds an overflow.
        self.zero.zero_grad()
        if self.zero.offload_optimizer:
            self.zero.reset_cpu_buffers()
        self.zero.averaged_gradients = {}
