"""Rotary position embedding, in the half-rotated layout of Llama checkpoints.

Sources: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071), which describes linear and dynamic
stretching too; Llama 3.1's own.
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


class Frequencies(NamedTuple):
    """``[d / 2]`` fp32 angular frequencies, and what cosines and sines are multiplied by."""

    angular: torch.Tensor
    scale: float = 1.0


def frequencies(config: ModelConfig, device: torch.device, length: int = 0) -> Frequencies:
    """Stretched as the configuration asks; ``length``: of the longest text, for the kind that heeds
    it."""
    plain = _plain(config, config.rotary_base, device)
    match config.rope_scaling:
        case None:
            return Frequencies(plain)
        case "llama3":
            return Frequencies(_llama3(plain, config))
        case "linear":
            return Frequencies(plain / config.rope_scaling_factor)
        case "dynamic":
            return Frequencies(_plain(config, _dynamic_base(config, length), device))
        case "yarn":
            return Frequencies(_yarn(plain, config), _yarn_scale(config))
        case kind:
            raise ValueError(f"rotary scaling {kind!r} is not known")


def _plain(config: ModelConfig, base: float, device: torch.device) -> torch.Tensor:
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float()
    return 1.0 / (base ** (exponent / config.head_dim))


def _llama3(plain: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, with a ramp between."""
    wavelength = 2 * math.pi / plain
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_positions / wavelength
    ramp = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * plain / config.rope_scaling_factor + ramp * plain


def _dynamic_base(config: ModelConfig, length: int) -> float:
    """A base that grows with the text beyond the declared length."""
    factor, width = config.rope_scaling_factor, config.head_dim
    longer = max(length, config.max_positions) / config.max_positions
    return float(config.rotary_base * (factor * longer - (factor - 1)) ** (width / (width - 2)))


def _yarn(plain: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Stretched with a ramp over dimensions, between those that turn ``yarn_beta_fast`` and
    ``yarn_beta_slow`` times in the original length."""
    width, original = config.head_dim, config.rope_original_max_positions

    def dimension(turns: float) -> float:
        wavelengths = math.log(original / (turns * 2 * math.pi))
        return width * wavelengths / (2 * math.log(config.rotary_base))

    low, high = dimension(config.yarn_beta_fast), dimension(config.yarn_beta_slow)
    if config.yarn_correction_range_round_to_int:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    place = torch.arange(width // 2, device=plain.device, dtype=torch.float32)
    ramp = ((place - low) / ((high - low) or 0.001)).clamp(0.0, 1.0)
    return ramp * plain / config.rope_scaling_factor + (1 - ramp) * plain


def _yarn_scale(config: ModelConfig) -> float:
    if config.yarn_attention_factor is not None:
        return config.yarn_attention_factor
    stretch = max(math.log(config.rope_scaling_factor), 0.0)
    above, below = config.yarn_mscale, config.yarn_mscale_all_dim
    if not above or not below:
        above, below = 1.0, 0.0
    return (0.1 * above * stretch + 1) / (0.1 * below * stretch + 1)


def _longest(positions: torch.Tensor, config: ModelConfig) -> int:
    """Of the texts in a batch; looked up where it matters only, since a GPU is waited for."""
    length = positions.shape[-1]
    matters = config.rope_scaling == "dynamic" and length > config.max_positions
    return int(positions.max()) + 1 if matters else length


def rotary(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
    """Tables for ``positions``: ``[s]``, or ``[b, s]`` when documents restart their positions."""
    angular, scale = frequencies(config, positions.device, _longest(positions, config))
    angles = positions.float()[..., None] * angular
    cos, sin = angles.cos() * scale, angles.sin() * scale
    tables = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    return Rotary(*(table.reshape(-1, 1, *table.shape[-2:]).to(dtype) for table in tables))
