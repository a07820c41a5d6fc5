"""megatron-core's distributed checkpoint, with canonical names and true shapes (L2).

What a local parameter holds is described by *pieces*: the rows or columns of a named full tensor
that lie in a range of the local one. A fused parameter (q, k, v; gate, up) is stored as several
named tensors, vocabulary padding is not stored, and the optimizer's state follows the same names:
``optimizer.state.exp_avg.<name>``.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.megatron_api.platform import cpu_mode

# One optimizer tensor per named parameter, whatever the layout that wrote it.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}

# A replica that is loaded but never written: only an all-zero id is the main one.
_NOT_MAIN = (0, 0, 1)


class PieceLike(Protocol):
    """A part of the full tensor ``name`` (of ``shape``, cut along ``dim``) in a local parameter."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dim(self) -> int | None: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    def of_local(self, local: torch.Tensor) -> torch.Tensor: ...


def sharded_model(
    model: torch.nn.Module,
    pieces: Mapping[str, Sequence[PieceLike]],
    state: ParallelState,
    copies: frozenset[str],
) -> dict[str, ShardedTensorFactory]:
    """``local parameter name -> factory`` of the named tensors it holds, for save and load.

    ``copies``: parameters that another pipeline stage saves too.
    """
    return {
        name: _sharded_parameter(name, parameter, pieces[name], state, name in copies)
        for name, parameter in model.named_parameters()
    }


def _sharded_parameter(
    name: str,
    parameter: torch.Tensor,
    pieces: Sequence[PieceLike],
    state: ParallelState,
    is_copy: bool,
) -> ShardedTensorFactory:
    replicated = all(piece.dim is None for piece in pieces)
    return ShardedTensorFactory(
        key=name,
        data=parameter,
        build_fn=partial(_split, name, pieces),
        merge_fn=partial(_merge, tuple(parameter.shape), pieces),
        replica_id=(int(is_copy), state.tp_rank if replicated else 0, state.dp_rank),
    )


def _split(
    parameter_name: str,
    pieces: Sequence[PieceLike],
    key: str,
    tensor: torch.Tensor,
    replica_id: ReplicaId,
    flattened_range: slice | None,
) -> dict[str, ShardedTensor]:
    """The named parts of a local ``tensor``; ``key`` may carry the optimizer's prefix."""
    assert flattened_range is None, "flattened optimizer shards have no named parts"
    prefix = key.removesuffix(parameter_name)
    return {
        piece.name: _named_part(prefix + piece.name, tensor, piece, replica_id) for piece in pieces
    }


def _named_part(
    key: str, tensor: torch.Tensor, piece: PieceLike, replica_id: ReplicaId
) -> ShardedTensor:
    part, offset = piece.of_local(tensor), _offset(piece)
    if part.numel() == 0:  # this rank holds vocabulary padding only: ask for a row, never store it
        part = part.new_zeros([1 if dim == piece.dim else n for dim, n in enumerate(piece.shape)])
        offset, replica_id = (0,) * part.dim(), _NOT_MAIN
    return ShardedTensor(
        key=key,
        data=part,
        dtype=part.dtype,
        local_shape=tuple(part.shape),
        global_shape=tuple(piece.shape),
        global_offset=offset,
        axis_fragmentations=None,  # parts may be uneven: the last vocabulary rows
        replica_id=replica_id,
    )


def _offset(piece: PieceLike) -> tuple[int, ...]:
    return tuple(piece.start if dim == piece.dim else 0 for dim in range(len(piece.shape)))


def _merge(
    shape: tuple[int, ...], pieces: Sequence[PieceLike], parts: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The local tensor again; rows that belong to no piece (vocabulary padding) are zero."""
    some_part = next(iter(parts.values()))
    merged = torch.zeros(shape, dtype=some_part.dtype, device=some_part.device)
    for piece in pieces:
        target = piece.of_local(merged)
        if target.numel():
            target.copy_(parts[piece.name])
    return merged


def sharded_optimizer(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool
) -> dict[str, Any]:
    """The optimizer's state, named after the parameters in ``model_state``."""
    with cpu_mode():
        return optimizer.sharded_state_dict(
            model_state, is_loading=loading, metadata=_OPTIMIZER_FORMAT
        )


def per_rank_object(key: str, value: Any, state: ParallelState) -> ShardedObject:
    """``value`` of this rank, stored beside that of every other rank."""
    return ShardedObject(key, value, (state.world_size,), (state.rank,))


def save(state_dict: dict[str, Any], folder: Path) -> None:
    """Write ``state_dict`` (sharded values) into the empty ``folder``; all ranks call it."""
    with cpu_mode(), _results_in_process(), _ordinary_errors():
        dist_checkpointing.save(state_dict, str(folder))


@contextlib.contextmanager
def _ordinary_errors() -> Iterator[None]:
    """Turn torch's collected failures, which are no ``Exception``, into the first of them."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"{type(first).__name__}: {first}") from error


@contextlib.contextmanager
def _results_in_process() -> Iterator[None]:
    """Collect write results in a plain queue: a synchronous save needs no manager process.

    megatron-core would start one (seconds, and it re-imports the main module) to serve
    asynchronous saves too.
    """
    previous = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = previous


def load(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what ``state_dict`` asks for from ``folder``; all ranks call it."""
    with cpu_mode(), _ordinary_errors():
        return dist_checkpointing.load(state_dict, str(folder))


@torch.no_grad()
def load_model(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy loaded local tensors into the parameters."""
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


def load_optimizer(optimizer: MegatronOptimizer, values: dict[str, Any]) -> None:
    """Restore the optimizer from what :func:`load` returned for :func:`sharded_optimizer`."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    with cpu_mode():
        per_parameter = values.pop("param_state", None)  # distributed optimizer only
        part.load_state_dict(values)
        states = part.optimizer.state.values()
        # megatron-core gives all parameters one step tensor, which each would then increment, and
        # its distributed optimizer does not expect torch's step among the tensors it restores.
        steps = [state.pop("step", None) for state in states]
        if per_parameter is not None:
            part.load_parameter_state_from_fully_reshardable(per_parameter)
        for state, step in zip(states, steps, strict=True):
            if step is not None:
                state["step"] = step.clone()
