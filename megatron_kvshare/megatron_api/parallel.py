"""Process groups: from the launcher's environment to a :class:`ParallelState`."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.rendezvous import rendezvous

from megatron_kvshare.config.launch import Launch, launched
from megatron_kvshare.megatron_api.platform import Platform, activate


@dataclass(frozen=True)
class ParallelState:
    """This process's place in the job: its rank in the tensor-, pipeline- and data-parallel groups
    and their sizes."""

    platform: Platform
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """True on the one rank that prints and writes for the whole job."""
        return self.rank == 0

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` in place over the ranks that run the same layers: tensor- and
        data-parallel."""
        return all_reduce_(all_reduce_(tensor, self.tp_group), self.dp_group)


_STORE_TIMEOUT = timedelta(seconds=10)
_COLLECTIVE_GRACE = timedelta(minutes=1)
"""How much later than the watchdog, which knows more, a collective gives up by itself."""


def launcher_store(state: ParallelState) -> dist.Store | None:
    """A connection of its own to the store that the processes of this start have met at; None for
    a single process."""
    if state.world_size == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=_STORE_TIMEOUT)
    return dist.PrefixStore("kvshare", _of_this_start(store))


def _of_this_start(store: dist.Store) -> dist.Store:
    """``store`` without what ranks wrote before torchrun started them again: torch keeps the store
    and would connect to processes that are gone."""
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _start_process_group(platform: Platform, place: Launch, timeout: timedelta) -> None:
    rank, world_size, _ = place
    if world_size == 1:
        dist.init_process_group(
            platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            platform.backend,
            store=_of_this_start(store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )


def initialize(
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_stages: int = 1,
    backend: str = "auto",
    timeout_minutes: float = 10.0,
    place: Launch | None = None,
) -> ParallelState:
    """Start ``torch.distributed`` if nobody has, and megatron-core's groups for this layout;
    ``virtual_stages``: of each pipeline rank; ``place``: None: what the launcher says.

    Raises:
        ConfigError: the launcher's variables cannot be true.
    """
    place = place or launched()
    platform = activate(backend, place.local_rank)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes) + _COLLECTIVE_GRACE
        _start_process_group(platform, place, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=1 + math.ceil(timeout_minutes),
    )
    return current_state(platform)


def is_initialized() -> bool:
    """Whether megatron-core's groups are there."""
    return bool(parallel_state.model_parallel_is_initialized())


@contextlib.contextmanager
def alone(backend: str = "gloo") -> Iterator[ParallelState]:
    """This process as a world of one, for work on whole models, whatever has started it; groups
    that are there are kept."""
    if is_initialized():
        yield current_state(activate(backend))
        return
    try:
        yield initialize(backend=backend, place=Launch())
    finally:
        destroy()


def current_state(platform: Platform) -> ParallelState:
    """Read the groups megatron-core has built."""
    return ParallelState(
        platform=platform,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
    )


def destroy(keep_world: bool = False) -> None:
    """Tear down the groups; ``keep_world`` leaves ``torch.distributed`` itself for another
    layout."""
    if is_initialized():
        parallel_state.destroy_model_parallel()
    if not keep_world and dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank of ``group`` (None: of the job) gave, in their order."""
    parts: list[Any] = [mine] * dist.get_world_size(group)
    if len(parts) > 1:
        dist.all_gather_object(parts, mine, group=group)
    return parts


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum ``tensor`` over ``group`` in place; free when the group has one member."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
