"""What DeepSpeed is told: its JSON file read and checked, and agreed with the settings.

``file.py`` reads it, ``check.py`` checks it by the ``table.py`` of its ``keys.py``, ``said.py`` is
what it says of our settings, ``agreed.py`` completes these and finds what contradicts them, and
``told.py`` makes the configuration that DeepSpeed is given. No torch and no DeepSpeed: a test
compares the table with the installed one.
"""

from __future__ import annotations

from megatron_kvshare.config.deepspeed.agreed import Agreement, agree, all_given
from megatron_kvshare.config.deepspeed.rules import DEEPSPEED_RULES, ENGINE_RULES
from megatron_kvshare.config.deepspeed.told import Told, deepspeed_json, told, zero_of

__all__ = [
    "DEEPSPEED_RULES",
    "ENGINE_RULES",
    "Agreement",
    "Told",
    "agree",
    "all_given",
    "deepspeed_json",
    "told",
    "zero_of",
]
