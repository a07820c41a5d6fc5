"""What DeepSpeed is told: its JSON file read and checked, and agreed with the settings.

No torch, and no DeepSpeed: what it knows of its file is a table here.
"""

from __future__ import annotations

from megatron_kvshare.config.deepspeed.agreed import deepspeed_json

__all__ = ["deepspeed_json"]
