"""The command line of ``kvshare doctor --distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_kvshare.config.fields.types import SCHEMA, Bytes, Seconds, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse

_DESCRIPTION = """
Checks a job before it trains. Start it as the training will be started, on all processes: it calls
the roll, compares code and packages of all nodes, looks at the devices, the folder for checkpoints
and its free space, and measures the network with an all-reduce. Exit code: 0 when training can
start, 2 when there is something to put right, 69 when processes are missing or lost.
"""

_EXAMPLES = """
torchrun --nproc_per_node 8 -m megatron_kvshare doctor --distributed --save runs/my/checkpoint
"""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class PreflightConfig:
    """What the check of a job looks for."""

    distributed: bool = False
    """Check a whole job instead of this machine."""
    save: str | None = None
    """Folder the job will save to: every node must see it and be able to write there."""
    save_bytes: Bytes = 0
    """Bytes that must be free at --save, for example the size of the checkpoints to be kept."""
    timeout_seconds: Seconds = 180
    """Longest wait for the slowest process, and for the network; who is missing then is told."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """As in `kvshare pretrain`: auto takes NCCL when a GPU is there."""


def parse_preflight(argv: Sequence[str]) -> PreflightConfig:
    """The checked settings.

    Raises:
        ConfigError: with every fault at once.
    """
    return parse(
        PreflightConfig, argv, Command("kvshare doctor --distributed", _DESCRIPTION, _EXAMPLES)
    )
