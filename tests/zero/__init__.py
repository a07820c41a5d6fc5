"""Settings of runs by DeepSpeed: small buckets, so that toys need several, and under ZeRO 3 every
weight divided, gathered for every use and released after it."""

from __future__ import annotations

from pathlib import Path

_FILES = {0: None, 1: "2.json", 2: "2.json", 3: "3.json"}


def file_of(stage: int) -> str | None:
    """DeepSpeed's file for a stage: it heeds no more keys."""
    name = _FILES[stage]
    return None if name is None else str(Path(__file__).parent / name)


def settings_of(stage: int) -> dict[str, object]:
    """Of the section `deepspeed`."""
    return {"engine": "deepspeed", "zero_stage": stage, "deepspeed_config": file_of(stage)}
