"""Errors that mean "no memory left", of a device or of the host."""

from __future__ import annotations

import errno
import re
from typing import NamedTuple

import torch

_TEXTS = (
    "out of memory",  # CUDA by itself, and inside errors of NCCL
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
_HOST_TEXTS = ("defaultcpuallocator", "cannot allocate memory")
_LONGEST = 300


class Shortage(NamedTuple):
    """``said``: the error's own words, in short; ``on_host``: it was not a device that ran out;
    ``fragmented``: torch holds as much as it asked for, in pieces it could not use."""

    said: str
    on_host: bool
    fragmented: bool


def shortage(error: BaseException) -> Shortage | None:
    """What an error says about memory that has run out; None where it is about something else."""
    text = str(error).strip()
    lower = text.lower()
    out_of_host = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    on_host = out_of_host or any(each in lower for each in _HOST_TEXTS)
    # torch has a class of its own for what its allocators report; cuBLAS and NCCL only have words.
    is_ours = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(each in lower for each in (*_TEXTS, *_HOST_TEXTS))
    )
    if not (out_of_host or is_ours):
        return None
    return Shortage(_short(text) or type(error).__name__, on_host, _is_fragmented(text))


def _short(text: str) -> str:
    """Up to what is free: where the rest of the memory is follows, and advice for programmers."""
    sentence = re.search(r"Tried to allocate.*? is free", text)
    lines = [line for line in text.splitlines() if any(each in line.lower() for each in _TEXTS)]
    first = lines[0] if lines else text.partition("\n")[0]
    return sentence.group() if sentence else first.rstrip(". ")[:_LONGEST]


def _is_fragmented(text: str) -> bool:
    wanted = re.search(r"Tried to allocate ([\d.]+) (\w+)", text)
    unused = re.search(r"([\d.]+) (\w+) is reserved by PyTorch but unallocated", text)
    return bool(wanted and unused and _size(unused) >= _size(wanted))


def _size(found: re.Match[str]) -> float:
    number, unit = found.groups()
    powers = {"bytes": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
    return float(number) * 1024 ** powers.get(unit, 0)
