"""torch.compile: whether this machine can use it for a GPU, and the compiled form of a formula.

What is compiled are plain functions without gradient, forward and backward apart: what backward
keeps is said by an ``autograd.Function``, and neither the mode of autograd nor who needs a gradient
leads to another compilation. A tensor's number of tokens is marked as one that changes. When a
formula still meets more kinds of arguments than torch compiles (8), torch runs it uncompiled, which
is slow and right.

Ranks of one host share inductor's cache: torch locks its entries and writes them in one go.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch._dynamo.decorators import maybe_mark_dynamic

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def compile_fault() -> str | None:
    """Why nothing can be compiled for a GPU here, or None: Triton builds its launchers in C."""
    from torch.utils._triton import has_triton_package

    if not has_triton_package():
        return "Triton cannot be imported"
    compilers = (os.environ.get("CC") or "gcc", "clang", "cc")
    if not any(map(shutil.which, compilers)):
        return "there is no C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h) are not installed"
    return None


@functools.cache
def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` by inductor, compiled when it is first called."""
    return torch.compile(function)


def changing(x: torch.Tensor, *dims: int) -> torch.Tensor:
    """``x``, whose sizes along ``dims`` differ between calls: one compilation serves all."""
    view = x.view_as(x)
    maybe_mark_dynamic(view, dims)
    return view


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``[.., h]`` -> ``[n, h]``, whose ``n`` differs between calls."""
    return changing(x.flatten(0, -2), 0)
