"""``kvshare verify``: whether a checkpoint and a Hugging Face folder are the same model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kvshare.config.fields.types import SCHEMA, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse

_EXAMPLES = """\
  kvshare verify --load runs/small-sandwich-top-4/checkpoint --hf runs/hf

Exit code 0: every tensor is equal bit by bit, the description agrees, and fp32 logits are within
the limit that is printed. Every conversion runs this by itself."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class VerifyConfig:
    """The two to compare."""

    load: str
    """The --save folder of a run, or one of its iter_* folders."""
    hf: str
    """Hugging Face folder."""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command = Command(
        "kvshare verify", "Compare a checkpoint with a Hugging Face folder.", _EXAMPLES
    )
    config = parse(VerifyConfig, argv, command)
    from megatron_kvshare.checkpoint.reader import open_checkpoint
    from megatron_kvshare.conversion.config_keys import doubts
    from megatron_kvshare.conversion.folder import CONFIG, read_json
    from megatron_kvshare.conversion.verify import verify
    from megatron_kvshare.megatron_api import parallel

    stored = open_checkpoint(Path(config.load))
    folder = Path(config.hf)
    with parallel.alone() as state:
        print(verify(stored, folder, state))
    for doubt in (*stored.doubts, *doubts(read_json(folder / CONFIG))):
        print(f"warning: {doubt}", file=sys.stderr)
    return 0
