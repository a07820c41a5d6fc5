"""What a rank saves and loads: boxes of full tensors that have names, whatever the layout.

``<name>``: a weight, named as in Hugging Face's Llama; ``optimizer.state.exp_avg.<name>``,
``....exp_avg_sq.<name>`` and, under bf16, ``....fp32_param.<name>``: its AdamW state;
``optimizer.state.step``: the number of updates; ``random_state.<rank>.<generator>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from megatron_kvshare.megatron_api.optimizer_state import HeldState
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.parameters import Piece, parameter_pieces

OPTIMIZER, RANDOM_STATE = "optimizer.", "random_state."
UPDATES = f"{OPTIMIZER}state.step"


class Part(NamedTuple):
    """The box of the full tensor ``name`` (of ``shape``) that starts at ``offset``.

    ``data`` is a view of the memory it comes from and goes to; ``ours``: this rank writes it, other
    ranks that hold the same do not.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor
    ours: bool = True


class OptimizerState(Protocol):
    """What checkpoints ask of an optimizer, whichever it is."""

    def held(self, weight: torch.nn.Parameter) -> HeldState | None:
        """What this rank holds for one of its weights; None where other data-parallel ranks hold
        it."""
        ...

    @property
    def updates(self) -> int:
        """How many the state has seen; 0 on a rank that holds none."""
        ...

    def set_updates(self, count: int) -> None:
        """Continue counting at ``count``."""
        ...

    def follow_weights(self) -> None:
        """Make fp32 copies of weights equal to these, which were loaded without them."""
        ...


class _Local(NamedTuple):
    """A weight of this rank, and what full tensors it consists of."""

    weight: torch.nn.Parameter
    pieces: Sequence[Piece]
    alone: bool
    """No other tensor-parallel rank or pipeline stage that would write it holds the same."""
    turn: bool
    """It is on this data-parallel rank to write it: they all hold the same and take turns."""


def weight_parts(models: Sequence[KVShareGPT], state: ParallelState) -> list[Part]:
    """The weights of this rank's pipeline stages; the names know no stages."""
    return [
        part
        for local in _locals(models, state)
        for part in _boxes(local, "", local.weight.detach().view(-1), 0, local.turn)
    ]


def optimizer_parts(
    optimizer: OptimizerState, models: Sequence[KVShareGPT], state: ParallelState
) -> list[Part]:
    """The optimizer's state of these weights, as far as this rank holds it."""
    parts: list[Part] = []
    for local in _locals(models, state):
        held = optimizer.held(local.weight)
        if held is None:
            continue
        for kind, flat in held.tensors.items():
            prefix = f"{OPTIMIZER}state.{kind}."
            parts += _boxes(local, prefix, flat, held.start, local.turn or held.divided)
    return parts


def single_parts(prefix: str, values: Mapping[str, torch.Tensor], ours: bool = True) -> list[Part]:
    """Whole tensors that one rank holds."""
    return [
        Part(prefix + name, tuple(value.shape), (0,) * value.dim(), value, ours)
        for name, value in values.items()
    ]


def _locals(models: Sequence[KVShareGPT], state: ParallelState) -> Iterator[_Local]:
    number = 0
    for model in models:
        pieces = parameter_pieces(model)
        for name, weight in model.named_parameters():
            replicated = all(piece.dim is None for piece in pieces[name])
            alone = name not in model.copies and not (replicated and state.tp_rank)
            yield _Local(weight, pieces[name], alone, number % state.dp_size == state.dp_rank)
            number += 1


def _boxes(
    local: _Local, prefix: str, flat: torch.Tensor, start: int, turn: bool
) -> Iterator[Part]:
    """``flat``, elements ``start...`` of the local weight, as boxes of full tensors."""
    for box, data in rectangles(flat, start, tuple(local.weight.shape)):
        for piece in local.pieces:
            part = _overlap(box, data, piece)
            if part is not None:
                offset, view = part
                ours = local.alone and turn
                yield Part(prefix + piece.name, piece.shape, offset, view, ours)


def rectangles(
    flat: torch.Tensor, start: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """A run of elements of a vector or matrix as at most three boxes: (offset, view).

    The rest of a row, whole rows, the start of a row.
    """
    stop, width = start + flat.numel(), shape[-1]
    if len(shape) == 1:
        cuts = [start, stop]
    else:
        first, last = -(-start // width) * width, stop // width * width
        cuts = [start, *(cut for cut in (first, last) if start < cut < stop), stop]
    for begin, end in pairwise(cuts):
        if begin == end:
            continue
        run = flat[begin - start : end - start]
        if len(shape) == 1:
            yield (begin,), run
        else:
            row, column = divmod(begin, width)
            yield (row, column), run.view(-1, min(width, end - begin))


def _overlap(
    box: tuple[int, ...], data: torch.Tensor, piece: Piece
) -> tuple[tuple[int, ...], torch.Tensor] | None:
    """What of a box of the local weight belongs to ``piece``: (offset in the full tensor, view)."""
    if piece.dim is None:
        return box, data
    dim, begin = piece.dim, box[piece.dim]
    low = max(begin, piece.local_start)
    high = min(begin + data.shape[dim], piece.local_start + piece.stop - piece.start)
    if low >= high:
        return None
    offset = list(box)
    offset[dim] = low - piece.local_start + piece.start
    return tuple(offset), data.narrow(dim, low - begin, high - low)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Generator states by name, as tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what :func:`random_state` returned, as far as this platform has it."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
