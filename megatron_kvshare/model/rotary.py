"""Rotary position embedding, in the half-rotated layout of Llama checkpoints.

Source: RoFormer (arXiv 2104.09864); long-context scaling as in Llama 3.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megatron_kvshare.config import ModelConfig


class Rotary(NamedTuple):
    """Cosines and sines, each ``[1 or b, 1, s, d]``; the sine's first half is negated."""

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """``[d / 2]`` fp32 angular frequencies, scaled for long context when the configuration asks."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float()
    frequencies = 1.0 / (config.rotary_base ** (exponent / config.head_dim))
    return _scaled(frequencies, config) if config.use_rope_scaling else frequencies


def _scaled(frequencies: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, with a ramp
    between."""
    wavelength = 2 * math.pi / frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_positions / wavelength
    ramp = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * frequencies / config.rope_scaling_factor + ramp * frequencies


def rotary(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
    """Tables for ``positions``: ``[s]``, or ``[b, s]`` when documents restart their positions."""
    angles = positions.float()[..., None] * inverse_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()
    tables = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    return Rotary(*(table.reshape(-1, 1, *table.shape[-2:]).to(dtype) for table in tables))
