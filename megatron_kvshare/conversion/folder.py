"""The files of a Hugging Face folder: safetensors read and written tensor by tensor."""

from __future__ import annotations

import json
import re
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_kvshare.checkpoint.tensors import TensorInfo, TensorSource
from megatron_kvshare.errors import CheckpointError, Fault

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}
"""As which type a stored one is read: there is no training in fp16, and fp32 holds it exactly."""
MAX_SHARD_BYTES = 5 * 10**9
_OF_A_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SHOWN = 8
"""Tensors that are not where the index says, named in one message; the others are counted."""


def broken(path: Path, value: object, rule: str, fix: str) -> CheckpointError:
    """The error for a file of the folder."""
    return CheckpointError(Fault(str(path), value, rule, fix))


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises :class:`CheckpointError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError as error:
        fix = "give a folder written by save_pretrained or by `kvshare convert to-hf`"
        raise broken(path, "missing", "the folder has no such file", fix) from error
    except (OSError, ValueError) as error:
        raise broken(path, str(error), "it is no readable JSON", "download it again") from error
    if not isinstance(content, dict):
        raise broken(path, type(content).__name__, "it must hold an object", "download it again")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, readers take the one or the other."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {', '.join(twice)} is there twice")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class HuggingFaceWeights:
    """The tensors of a folder, from the files that transformers takes: ``model.safetensors``, else
    the shards of the index. Every file is opened, no tensor is read before it is asked for.

    ``unread``: weights beside them that neither reads.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not fit the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._shard_of: dict[str, Path] = {}
        self._refuse_others()
        indexed = (folder / INDEX).is_file() and not (folder / SINGLE).is_file()
        if indexed:
            self._open_shards()
        else:
            self._open(folder / SINGLE)
        beside = {path.name for path in folder.glob("model*.safetensors*")}
        read = {INDEX if indexed else SINGLE, *(path.name for path in self._shard_of.values())}
        self.unread = tuple(sorted(beside - read))

    def _refuse_others(self) -> None:
        """Weights that transformers would take besides, or instead."""
        adapter = self.folder / "adapter_config.json"
        if adapter.exists():
            rule = "transformers adds an adapter to the weights; here it would be left out"
            raise broken(adapter, "an adapter", rule, "merge it (merge_and_unload) and save that")
        for path in sorted(self.folder.glob("shard-*-model-*-of-*.safetensors")):
            if _OF_A_RANK.fullmatch(path.name):
                rule = (
                    "transformers takes such files of several ranks first; they are not read here"
                )
                raise broken(path, "of a rank", rule, "save the whole model (save_pretrained)")

    def _open_shards(self) -> None:
        listed, index = self._listed(), self.folder / INDEX
        for shard in dict.fromkeys(listed.values()):
            self._open(self.folder / shard)
        fix = "download index and shards again"
        faults = [
            Fault(f"{index}: {name}", shard, "it is not where it says: not in this file", fix)
            for name, shard in listed.items()
            if self._shard_of.get(name) != self.folder / shard
        ]
        faults += [
            Fault(f"{index}: {name}", None, f"{shard.name} has this tensor, the index not", fix)
            for name, shard in self._shard_of.items()
            if name not in listed
        ]
        if len(faults) > _SHOWN:
            rule = f"{len(faults) - _SHOWN} more tensors are not where it says"
            faults[_SHOWN:] = [Fault(str(index), len(listed), rule, fix)]
        if faults:
            raise CheckpointError(faults)

    def _listed(self) -> dict[str, str]:
        path = self.folder / INDEX
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise broken(path, listed, "it must hold a weight_map", "download it again")
        rule = "a tensor lies in a .safetensors file of this folder"
        faults = [
            Fault(f"{path}: {name}", shard, rule, "download it again")
            for name, shard in listed.items()
            if not _is_inside(shard)
        ]
        if faults:
            raise CheckpointError(faults[:_SHOWN])
        return listed

    def _open(self, shard: Path) -> None:
        if not shard.is_file():
            pickled = list(self.folder.glob("*.bin"))
            rule = "the weights are missing"
            fix = "complete the download"
            if pickled:
                rule = f"there are only pickled weights ({pickled[0].name}), which can run code"
                fix = "save the model as safetensors (save_pretrained does)"
            raise broken(shard, "missing", rule, fix)
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        rule = f"tensor {name} has the type {part.get_dtype()}"
                        fix = f"save it in one of {', '.join(_DTYPES)}"
                        raise broken(shard, part.get_dtype(), rule, fix)
                    if name in self.tensors:
                        rule = f"tensor {name} is in {self._shard_of[name].name} too"
                        raise broken(shard, name, rule, "download index and shards again")
                    self.tensors[name] = TensorInfo(tuple(part.get_shape()), dtype)
                    self._shard_of[name] = shard
        except (SafetensorError, OSError, struct.error) as error:
            rule = "it is no complete safetensors file"
            raise broken(shard, str(error), rule, "download it again") from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        try:
            with safe_open(self._shard_of[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor.to(self.tensors[name].dtype)
        except (SafetensorError, OSError) as error:
            where = self._shard_of[name]
            raise broken(where, str(error), "it is damaged", "download it again") from error


def _is_inside(shard: object) -> bool:
    """Whether the path that an index gives stays in its folder."""
    if not isinstance(shard, str) or not shard.endswith(".safetensors"):
        return False
    path = PurePosixPath(shard)
    return not path.is_absolute() and ".." not in path.parts and not {"\0", "\\"} & set(shard)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """With the mode that the umask gives to new files: safetensors' own are their owner's alone."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_weights(
    source: TensorSource,
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    done: Callable[[int, int], None] = lambda written, of: None,
) -> None:
    """Write ``model*.safetensors`` and, for several, their index; one shard at a time in memory.

    ``done`` is told the bytes written so far, and of how many.
    """
    plan = split_state_dict_into_shards_factory(
        dict(source.tensors),
        get_storage_size=lambda info: info.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    total = sum(info.num_bytes for info in source.tensors.values())
    written = 0
    for shard, names in plan.filename_to_tensors.items():
        tensors = {name: source.read(name).contiguous() for name in names}
        _save(tensors, folder / shard)
        written += sum(source.tensors[name].num_bytes for name in names)
        done(written, total)
    if plan.is_sharded:
        weight_map = dict(sorted(plan.tensor_to_filename.items()))
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": weight_map})
