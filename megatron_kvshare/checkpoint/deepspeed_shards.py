"""What DeepSpeed has written, as tensors by name: of any ZeRO stage, data- and tensor-parallel
size, read by one process that needs no DeepSpeed.

A folder holds, of every tensor-parallel rank, one file with its model (``mp_rank_00_model_states``;
at ZeRO 3 one of every rank) and of every rank one with its part of the optimizer state
(``zero_pp_rank_0_mp_rank_00_optim_states``). A part is a run of numbers without names:

* ZeRO 1 and 2 lay all parameters of an AdamW group end to end and cut the whole evenly;
* ZeRO 3 cuts every parameter evenly, and lays these pieces end to end in groups of some size.

Which parameters, in which order and of which shapes, the model's file says (``param_shapes``).
Source: deepspeed/utils/zero_to_fp32.py, and the optimizers in deepspeed/runtime/zero.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_kvshare.checkpoint.manifest import file_inside
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.memory import shortage

Shape = tuple[int, ...]
WEIGHT = "fp32"
"""The kind of an fp32 weight; the others are AdamW's ``exp_avg`` and ``exp_avg_sq``."""
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")
PARAMETER_GROUPS = "kvshare_parameter_groups"
"""Names of the parameters in each AdamW group, in their order: our entry in the model's file,
without which nothing tells at ZeRO 0 whose state a number belongs to."""

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_SHOWN = 4


class _Plain:
    """Stands for a class of DeepSpeed's: holds what the file says of it, and does nothing."""


class _Address(_Plain):
    """The same for another class: each needs a type of its own."""


_ALLOWED: list[Any] = [
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Address, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""What DeepSpeed's files name besides tensors and plain data."""


class Run(NamedTuple):
    """Numbers ``start..stop`` of group ``group`` in the part of data-parallel rank ``rank``."""

    rank: int
    group: int
    start: int
    stop: int


class Held(NamedTuple):
    """A parameter of a tensor-parallel rank: where its numbers lie; the last may be padding."""

    shape: Shape
    runs: tuple[Run, ...]


class Shards:
    """The shards of one tensor-parallel rank; ``parameters``: what it holds, by name.

    ``updates``: steps that AdamW has taken.
    """

    def __init__(self, parameters: Mapping[str, Held], parts: Sequence[Any], updates: int) -> None:
        self.parameters = parameters
        self.updates = updates
        self._parts = parts

    def read(self, name: str, kind: str) -> torch.Tensor:
        """A parameter in fp32, or one of its moments, as large as on its rank."""
        shape, runs = self.parameters[name]
        found = [self._parts[run.rank][run.group][kind][run.start : run.stop] for run in runs]
        numbers = torch.cat([each.detach().float() for each in found])
        return numbers[: math.prod(shape)].view(shape)


def read_shards(folder: Path) -> list[Shards]:
    """The shards of every tensor-parallel rank.

    Raises:
        CheckpointError: files are missing, damaged, contradict each other, or would run code.
    """
    models, optimizers = _files(folder)
    found = []
    for rank in range(len(models)):
        model = _load(folder, models[rank])
        parts = [_load(folder, name) for name in optimizers[rank]]
        try:
            found.append(_shards(model, parts))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            names = ", ".join([models[rank], *optimizers[rank][:_SHOWN]])
            rule = f"they are not what DeepSpeed writes: {type(error).__name__}: {error}"
            raise _damaged(folder, names, rule) from error
    return found


def _files(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Of each tensor-parallel rank the file of its model, and those of the optimizer in the order
    of the data-parallel ranks."""
    names = sorted(path.name for path in folder.glob("*.pt"))
    models = {int(each[2]): each[0] for each in _matches(_MODEL, names) if not int(each[1] or 0)}
    states = {(int(each[2]), int(each[1])): each[0] for each in _matches(_OPTIMIZER, names)}
    first = _load(folder, models[0]) if 0 in models else {}
    try:
        tensor, data = int(first["mp_world_size"]), int(first["dp_world_size"])
    except (KeyError, TypeError, ValueError):
        rule = "DeepSpeed's first file is missing, or does not say how many ranks there were"
        raise _damaged(folder, "mp_rank_00_model_states.pt", rule) from None
    wanted = [] if first.get("optimizer") is not None else range(data)
    missing = [
        f"mp_rank_{rank:02d}_model_states.pt" for rank in range(tensor) if rank not in models
    ]
    missing += [
        f"zero_pp_rank_{each}_mp_rank_{rank:02d}_optim_states.pt"
        for rank, each in itertools.product(range(tensor), wanted)
        if (rank, each) not in states
    ]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        rule = f"of {tensor} x {data} ranks (tensor x data parallel) files are missing{more}"
        raise _damaged(folder, ", ".join(missing[:_SHOWN]), rule)
    ranks = range(tensor)
    return [models[rank] for rank in ranks], [[states[rank, d] for d in wanted] for rank in ranks]


def _matches(pattern: re.Pattern[str], names: Sequence[str]) -> Iterator[re.Match[str]]:
    return (found for found in map(pattern.fullmatch, names) if found)


def _load(folder: Path, name: str) -> dict[str, Any]:
    """A file as data: torch's reader that builds what is allowed and nothing else. Tensors stay in
    the file until they are read."""
    try:
        path = file_inside(folder, name)
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:  # a damaged pickle raises nearly anything
        if shortage(error):
            raise
        raise damaged_file(folder / name, error) from error


def damaged_file(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that is not what DeepSpeed writes, or that would run code."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return _damaged(path.parent, path.name, f"it cannot be read as data: {reason}")


def _damaged(folder: Path, name: str, rule: str) -> CheckpointError:
    fix = "restore the files from a backup, or use another checkpoint"
    return CheckpointError(Fault(f"{folder}: {name}", name, rule, fix))


def _shards(model: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Shards:
    if not parts:
        return _unpartitioned(model)
    states = [each["optimizer_state_dict"] for each in parts]
    stage = int(states[0].get("zero_stage", 1))
    inner = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    weights = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat = [
        [
            {WEIGHT: weight.view(-1), **_moments(state[inner]["state"][group])}
            for group, weight in enumerate(state[weights])
        ]
        for state in states
    ]
    shapes = [
        {name: tuple(shape) for name, shape in each.items()} for each in model["param_shapes"]
    ]
    if stage == 3:
        merged = {name: shape for each in shapes for name, shape in each.items()}
        held = dict(_cut_each(merged, flat))
    else:
        paddings = states[0].get("param_alignment_paddings")
        held = {}
        for group, each in enumerate(shapes):
            padding = paddings[group] if paddings else [0] * len(each)
            held |= _cut_whole(each, group, flat, padding)
    return Shards(held, flat, _updates(states[0][inner]["state"]))


def _moments(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {kind: state[kind].view(-1) for kind in KINDS if kind != WEIGHT}


def _updates(states: Mapping[int, Mapping[str, Any]]) -> int:
    return int(next(iter(states.values()))["step"])


def _cut_whole(
    shapes: Mapping[str, Shape], group: int, flat: Sequence[Any], paddings: Sequence[int]
) -> dict[str, Held]:
    """ZeRO 1 and 2: the parameters of a group end to end, cut evenly over the ranks."""
    size = flat[0][group]["exp_avg"].numel()  # the weights of the last rank lack its padding
    held, start = {}, 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        stop = start + math.prod(shape)
        held[name] = Held(
            shape,
            tuple(
                Run(rank, group, max(start - rank * size, 0), min(stop - rank * size, size))
                for rank in range(start // size, -(-stop // size))
            ),
        )
        start = stop + padding
    if -(-start // size) > len(flat):
        raise ValueError(f"{start:,} numbers of group {group} in {len(flat)} parts of {size:,}")
    return held


def _cut_each(shapes: Mapping[str, Shape], flat: Sequence[Any]) -> Iterator[tuple[str, Held]]:
    """ZeRO 3: every parameter cut evenly, the pieces of a rank end to end through its groups."""
    ranks = len(flat)
    ends = list(itertools.accumulate(each[WEIGHT].numel() for each in flat[0]))
    start = 0
    for name, shape in shapes.items():
        stop = start - (-math.prod(shape) // ranks)
        places = list(_places(start, stop, ends))
        runs = [Run(rank, *place) for rank in range(ranks) for place in places]
        yield name, Held(shape, tuple(runs))
        start = stop
    if start != ends[-1]:
        raise ValueError(f"{start:,} numbers of a rank, and {ends[-1]:,} in its file")


def _places(start: int, stop: int, ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Numbers ``start..stop`` of groups that end at ``ends``: (group, its start, its stop)."""
    for group, (first, last) in enumerate(itertools.pairwise((0, *ends))):
        low, high = max(start, first), min(stop, last)
        if low < high:
            yield group, low - first, high - first


def _unpartitioned(model: Mapping[str, Any]) -> Shards:
    """ZeRO 0 in fp32: every rank has had everything, and one has written it."""
    state = model["optimizer"]["state"]
    groups = zip(model["optimizer"]["param_groups"], model[PARAMETER_GROUPS], strict=True)
    numbers = {
        name: number
        for group, names in groups
        for number, name in zip(group["params"], names, strict=True)
    }
    held, part = {}, []
    for name, number in numbers.items():
        weight = model["module"][name]
        held[name] = Held(tuple(weight.shape), (Run(0, len(part), 0, weight.numel()),))
        part.append({WEIGHT: weight.view(-1), **_moments(state[number])})
    return Shards(held, [part], _updates(state))
