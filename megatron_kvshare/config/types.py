"""Value types of configuration fields (L1): the range of one number is declared where the field is.

What concerns a single value is a type; what concerns several is a rule (``rules_*.py``).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Count = Annotated[int, Field(ge=1)]
"""A whole number of at least 1."""

Index = Annotated[int, Field(ge=0)]
"""A whole number of at least 0."""

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
    "Count",
    "Fraction",
    "Index",
    "Momentum",
    "NonNegative",
    "Positive",
    "Ratio",
    "dataclass",
]
