"""The parameter map (L3): every local weight as parts of true, named, full tensors.

Names are those of Hugging Face's Llama. Initialisation, checkpoints, comparisons across layouts and
conversion all ask :func:`parameter_pieces`; nobody else knows how weights are fused or split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.layer import KVShareLayer

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

    def even(self, name: str, shape: tuple[int, int], dim: int, local_start: int = 0) -> Piece:
        part = shape[dim] // self.tp_size
        start = self.tp_rank * part
        return Piece(name, shape, dim, start, start + part, local_start)

    def stacked(self, *parts: tuple[str, tuple[int, int]]) -> tuple[Piece, ...]:
        """Several matrices, each split by rows, one above the other in one local parameter."""
        pieces: list[Piece] = []
        for name, shape in parts:
            below = pieces[-1].local_start + shape_part(pieces[-1]) if pieces else 0
            pieces.append(self.even(name, shape, 0, below))
        return tuple(pieces)

    def vocabulary(self, name: str, vocab_size: int, local_rows: int, hidden: int) -> Piece:
        start = min(self.tp_rank * local_rows, vocab_size)
        stop = min((self.tp_rank + 1) * local_rows, vocab_size)
        return Piece(name, (vocab_size, hidden), 0, start, stop)


def shape_part(piece: Piece) -> int:
    """Rows or columns of the piece on this rank."""
    return piece.stop - piece.start


def parameter_pieces(model: KVShareGPT) -> dict[str, tuple[Piece, ...]]:
    """Local parameter name -> the pieces of full tensors it holds, top to bottom."""
    heads, hidden = model.heads, model.config.hidden_size
    split = _Splitter(heads.tp_rank, heads.tp_size)
    pieces: dict[str, tuple[Piece, ...]] = {}
    ends = {"embedding": "model.embed_tokens.weight", "output_layer": "lm_head.weight"}
    if model.share_embeddings_and_output_weights:
        ends["output_layer"] = ends["embedding"]
    for end, name in ends.items():
        weight = getattr(getattr(model, end), "weight", None)
        if weight is not None:
            part = split.vocabulary(name, model.vocab_size, weight.shape[0], hidden)
            pieces[f"{end}.weight"] = (part,)
    if model.decoder.final_layernorm is not None:
        pieces["decoder.final_layernorm.weight"] = (Piece("model.norm.weight", (hidden,)),)
    for local, layer in enumerate(model.decoder.layers):
        prefix = f"model.layers.{model.stage.first + local}."
        for name, parts in _layer_pieces(prefix, layer, split, hidden).items():
            pieces[f"decoder.layers.{local}.{name}"] = parts
    assert pieces.keys() == dict(model.named_parameters()).keys(), "a parameter has no name"
    return pieces


def _layer_pieces(
    prefix: str, layer: KVShareLayer, split: _Splitter, hidden: int
) -> dict[str, tuple[Piece, ...]]:
    attention = layer.self_attention
    heads = attention.heads
    projections = [("q", heads.query_width)]
    if attention.is_producer:
        projections += [("k", heads.kv_width), ("v", heads.kv_width)]
    rows = [(f"{prefix}self_attn.{p}_proj.weight", (width, hidden)) for p, width in projections]
    ffn = layer.mlp.linear_fc2.weight.shape[1] * split.tp_size
    gated = [(f"{prefix}mlp.{p}_proj.weight", (ffn, hidden)) for p in ("gate", "up")]
    output = (hidden, heads.query_width)
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return {
        "self_attention.linear_qkv.weight": split.stacked(*rows),
        "self_attention.linear_proj.weight": (
            split.even(f"{prefix}self_attn.o_proj.weight", output, 1),
        ),
        "mlp.linear_fc1.weight": split.stacked(*gated),
        "mlp.linear_fc2.weight": (split.even(f"{prefix}mlp.down_proj.weight", (hidden, ffn), 1),),
        **{norm: (Piece(prefix + norm, (hidden,)),) for norm in norms},
    }


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
    for group, size in ((state.tp_group, state.tp_size), (state.pp_group, state.pp_size)):
        lists: list[list[Any]] = [mine] * size
        if size > 1:
            dist.all_gather_object(lists, mine, group=group)
        mine = [each for one in lists for each in one]
    return mine
