"""The parameter map (L3): every local weight as parts of true, named, full tensors.

Names and shapes are those of :mod:`megatron_kvshare.sharing.weights`. Initialisation, checkpoints
and comparisons across layouts ask :func:`parameter_pieces`; nobody else knows how weights are fused
or split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_kvshare.config.shape import model_shape
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.sharing.weights import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    layer_prefix,
    weight_shapes,
)

_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


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


class _Splitter:
    """Builds pieces for one tensor-parallel rank."""

    def __init__(self, tp_rank: int, tp_size: int) -> None:
        self.tp_rank = tp_rank
        self.tp_size = tp_size

    def even(self, name: str, shape: tuple[int, ...], dim: int, local_start: int = 0) -> Piece:
        part = shape[dim] // self.tp_size
        start = self.tp_rank * part
        return Piece(name, shape, dim, start, start + part, local_start)

    def stacked(self, *parts: tuple[str, tuple[int, ...]]) -> tuple[Piece, ...]:
        """Several matrices, each split by rows, one above the other in one local parameter."""
        pieces: list[Piece] = []
        for name, shape in parts:
            below = pieces[-1].local_start + shape_part(pieces[-1]) if pieces else 0
            pieces.append(self.even(name, shape, 0, below))
        return tuple(pieces)

    def vocabulary(self, name: str, vocab_size: int, hidden: int, local_rows: int) -> Piece:
        start = min(self.tp_rank * local_rows, vocab_size)
        stop = min((self.tp_rank + 1) * local_rows, vocab_size)
        return Piece(name, (vocab_size, hidden), 0, start, stop)


def shape_part(piece: Piece) -> int:
    """Rows or columns of the piece on this rank."""
    return piece.stop - piece.start


_EVEN = {
    "self_attention.linear_proj": ("self_attn.o_proj.weight", 1),
    "mlp.linear_fc2": ("mlp.down_proj.weight", 1),
}
_STACKED = {
    "self_attention.linear_qkv": tuple(f"self_attn.{p}_proj.weight" for p in "qkv"),
    "mlp.linear_fc1": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def parameter_pieces(model: KVShareGPT) -> dict[str, tuple[Piece, ...]]:
    """Local parameter name -> the pieces of full tensors it holds, top to bottom."""
    shape = model_shape(model.model_config, model.vocab_size)
    shapes = weight_shapes(shape, model.plan.map)
    split = _Splitter(model.heads.tp_rank, model.heads.tp_size)
    pieces: dict[str, tuple[Piece, ...]] = {}
    tied = model.share_embeddings_and_output_weights
    for end, name in (("embedding", EMBEDDING), ("output_layer", EMBEDDING if tied else HEAD)):
        weight = getattr(getattr(model, end), "weight", None)
        if weight is not None:
            part = split.vocabulary(name, *shapes[name], weight.shape[0])
            pieces[f"{end}.weight"] = (part,)
    if model.decoder.final_layernorm is not None:
        pieces["decoder.final_layernorm.weight"] = (Piece(FINAL_NORM, shapes[FINAL_NORM]),)
    for local, number in enumerate(model.stage.layers):
        prefix = layer_prefix(number)
        mine = {name: each for name, each in shapes.items() if name.startswith(prefix)}
        for name, parts in _layer_pieces(prefix, mine, split).items():
            pieces[f"decoder.layers.{local}.{name}"] = parts
    assert pieces.keys() == dict(model.named_parameters()).keys(), "a parameter has no name"
    return pieces


def _layer_pieces(
    prefix: str, shapes: Mapping[str, tuple[int, ...]], split: _Splitter
) -> dict[str, tuple[Piece, ...]]:
    pieces: dict[str, tuple[Piece, ...]] = {}
    for local, names in _STACKED.items():
        full = [prefix + name for name in names if prefix + name in shapes]
        pieces[f"{local}.weight"] = split.stacked(*((name, shapes[name]) for name in full))
    for local, (name, dim) in _EVEN.items():
        pieces[f"{local}.weight"] = (split.even(prefix + name, shapes[prefix + name], dim),)
    for norm in _NORMS:
        pieces[norm] = (Piece(prefix + norm, shapes[prefix + norm]),)
    return pieces


def _initial_tensor(piece: Piece, seed: int, std: float) -> torch.Tensor:
    """The full initial tensor: a function of (seed, name, true shape) and nothing else."""
    if len(piece.shape) == 1:
        return torch.ones(piece.shape)
    digest = hashlib.sha256(f"{seed}:{piece.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(piece.shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: KVShareGPT, seed: int) -> None:
    """Fill the weights: normal, std ``init_method_std``; residual outputs ``/ sqrt(2 L)``; padding
    0.

    Equal on every layout and vocabulary padding, because each tensor is drawn whole and then cut.
    """
    settings = model.model_config
    residual_std = settings.init_method_std / math.sqrt(2 * settings.num_layers)
    parameters = dict(model.named_parameters())
    for local_name, pieces in parameter_pieces(model).items():
        parameters[local_name].zero_()
        for piece in pieces:
            is_output = piece.name.endswith(_RESIDUAL_OUTPUTS)
            full = _initial_tensor(
                piece, seed, residual_std if is_output else settings.init_method_std
            )
            piece.of_local(parameters[local_name]).copy_(piece.of_full(full))


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
