"""The parameter map: every local weight as parts of true, named, full tensors.

:func:`parameter_pieces` applies the table of :mod:`megatron_kvshare.costs.weights` to one rank's
parameters. Initialisation, checkpoints and comparisons across layouts ask it; nobody else knows how
weights are fused or split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_kvshare.costs.weights import Held, Init, Split, Weight
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.heads import HeadLayout
from megatron_kvshare.spec.model_spec import ModelSpec


@dataclass(frozen=True)
class Piece:
    """Rows or columns ``start..stop`` of the full tensor ``name``, held at ``local_start..`` of a
    parameter.

    ``shape`` is the full tensor's, without padding; ``dim`` the one it is split along over the
    tensor-parallel ranks, or None when every rank holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0
    local_start: int = 0

    def of_local(self, local: torch.Tensor) -> torch.Tensor:
        """The view of this piece in a tensor shaped like the local parameter."""
        if self.dim is None:
            return local
        return local.narrow(self.dim, self.local_start, self.stop - self.start)

    def of_full(self, full: torch.Tensor) -> torch.Tensor:
        """The view of this piece in the full tensor."""
        return (
            full if self.dim is None else full.narrow(self.dim, self.start, self.stop - self.start)
        )


def parameter_pieces(model: KVShareGPT) -> dict[str, tuple[Piece, ...]]:
    """Local parameter name -> the pieces of full tensors it holds, top to bottom."""
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    return pieces_of(model.spec, model.stage, shapes, model.heads)


def pieces_of(
    spec: ModelSpec, stage: Held, shapes: Mapping[str, tuple[int, ...]], heads: HeadLayout
) -> dict[str, tuple[Piece, ...]]:
    """The same of the parameters of a rank that is not here; ``shapes``: what it holds, by name."""
    pieces: dict[str, tuple[Piece, ...]] = {}
    for weight in spec.weights_on(stage):
        name = weight.parameter_on(stage)
        above = pieces.get(name, ())
        start = above[-1].local_start + above[-1].stop - above[-1].start if above else 0
        pieces[name] = (*above, _piece(weight, shapes[name], start, heads))
    assert pieces.keys() == shapes.keys(), "a parameter has no name"
    return pieces


def _piece(weight: Weight, held_in: tuple[int, ...], local_start: int, heads: HeadLayout) -> Piece:
    """What one tensor-parallel rank holds of a full tensor; ``held_in``: its parameter's shape."""
    name, shape = weight.name, weight.shape
    if weight.split is Split.WHOLE:
        return Piece(name, shape)
    dim = 1 if weight.split is Split.COLUMNS else 0
    # Of a padded vocabulary a rank holds as many rows as its parameter, the last ones fewer.
    padded = weight.split is Split.VOCABULARY
    part = held_in[0] if padded else shape[dim] // heads.tp_size
    start, stop = (min((heads.tp_rank + i) * part, shape[dim]) for i in (0, 1))
    return Piece(name, shape, dim, start, stop, local_start)


def _initial_tensor(weight: Weight, seed: int, std: float) -> torch.Tensor:
    """The full initial tensor: a function of (seed, name, true shape) and nothing else."""
    if weight.init is Init.ONES:
        return torch.ones(weight.shape)
    digest = hashlib.sha256(f"{seed}:{weight.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(weight.shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: KVShareGPT, seed: int) -> None:
    """Fill the weights: normal, std ``init_method_std``; residual outputs ``/ sqrt(2 L)``; padding
    0.

    Equal on every layout and vocabulary padding, because each tensor is drawn whole and then cut.
    """
    settings = model.spec.model
    table = {weight.name: weight for weight in model.spec.weights}

    def initial(name: str) -> torch.Tensor:
        std = table[name].initial_std(settings.init_method_std, settings.num_layers)
        return _initial_tensor(table[name], seed, std)

    fill(model, initial)


@torch.no_grad()
def fill(model: KVShareGPT, read: Callable[[str], torch.Tensor]) -> None:
    """Set the weights from full tensors, each asked for by its name; padding becomes zero."""
    parameters = dict(model.named_parameters())
    for local_name, pieces in parameter_pieces(model).items():
        parameters[local_name].zero_()
        for piece in pieces:
            piece.of_local(parameters[local_name]).copy_(piece.of_full(read(piece.name)))


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    gradient = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if gradient is None else gradient
    return torch.zeros_like(parameter) if gradient is None else gradient


_READERS: dict[str, Callable[[nn.Parameter], torch.Tensor]] = {
    "weight": lambda parameter: parameter.detach(),
    "grad": _gradient,
}


def gather_by_name(
    models: Sequence[KVShareGPT], state: ParallelState, which: str = "weight"
) -> dict[str, torch.Tensor]:
    """Full tensors by name, on the CPU: ``which`` is ``weight`` or ``grad`` (megatron-core's
    main_grad if there). ``models``: this rank's stages.

    Collective over the tensor- and pipeline-parallel groups; for verification, not for speed.
    """
    mine = [
        (piece, piece.of_local(_READERS[which](parameters[name])).cpu().clone())
        for model in models
        for parameters in (dict(model.named_parameters()),)
        for name, pieces in parameter_pieces(model).items()
        for piece in pieces
    ]
    full: dict[str, torch.Tensor] = {}
    for piece, part in _of_everyone(mine, state):
        if piece.name not in full:
            full[piece.name] = torch.zeros(piece.shape, dtype=part.dtype)
        piece.of_full(full[piece.name]).copy_(part)
    return full


def _of_everyone(mine: list[Any], state: ParallelState) -> list[Any]:
    """The lists of all ranks that hold one copy of the model, one after another."""
    for group in (state.tp_group, state.pp_group):
        mine = [each for one in gather_objects(mine, group) for each in one]
    return mine
