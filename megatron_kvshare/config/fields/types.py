"""Value types of configuration fields: the range of one number is declared where the field is.

What concerns a single value is a type; what concerns several is a rule (``rules/``). Bounds
are those of the libraries that get the number: megatron-core's C++ takes 32-bit sizes, its data
numpy's seeds, torch counts time-outs in nanoseconds of 64 bits.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_INT32 = (1 << 31) - 1

Count = Annotated[int, Field(ge=1, le=_INT32)]
"""A whole number of at least 1."""

Index = Annotated[int, Field(ge=0, le=_INT32)]
"""A whole number of at least 0."""

ZeroStage = Annotated[int, Field(ge=0, le=3)]
"""How much the data-parallel processes share out."""

Layers = Annotated[int, Field(ge=1, le=10_000)]
"""A number of layers; maps and plans are made layer by layer."""

Bytes = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
"""A number of bytes."""

Seed = Annotated[int, Field(ge=0, le=(1 << 32) - 1)]
"""What numpy's, torch's and megatron-core's generators all take."""

Minutes = Annotated[float, Field(gt=0, le=525_600, allow_inf_nan=False)]
"""A time of at most a year."""

Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]
"""A time of at most a year."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""

Ratio = Annotated[float, Field(gt=1, allow_inf_nan=False)]
"""A finite number above 1."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number of at least 0."""

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A number from 0 to 1."""

Momentum = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""A number from 0 up to, but not including, 1."""

SCHEMA = ConfigDict(use_attribute_docstrings=True, extra="forbid", coerce_numbers_to_str=True)
"""Shared by all groups: help text from the docstring under each field, unknown names refused."""

__all__ = [
    "SCHEMA",
    "Bytes",
    "Count",
    "Fraction",
    "Index",
    "Layers",
    "Minutes",
    "Momentum",
    "NonNegative",
    "Positive",
    "Ratio",
    "Seconds",
    "Seed",
    "ZeroStage",
    "dataclass",
]
