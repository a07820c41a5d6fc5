"""A command of `kvshare` as a script of its own: what the scripts beside this file share."""

from __future__ import annotations

import sys
from typing import NoReturn

from megatron_kvshare.cli.main import main


def kvshare(*command: str) -> NoReturn:
    """Run ``command`` with the script's arguments, and end with its exit code."""
    sys.exit(main([*command, *sys.argv[1:]]))
