"""Token files get their names so that a killed process never leaves a pair that does not belong
together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_kvshare.ownership.aside import sync

INDEX, TOKENS, NOTES = ".idx", ".bin", ".meta.json"


def publish(partial: Mapping[str, Path], prefix: str) -> None:
    """Rename the complete files ``partial``, by suffix, to those at ``prefix``.

    Nothing reads tokens without an index. So the old one goes first and the new one comes last:
    what is found in between is no pair, whatever else is there by then. Each step is on the disk
    before the next. A call that was killed is called again with the files that are left.
    """
    if INDEX not in partial:
        return
    folder = Path(prefix).parent
    sync(*partial.values())
    Path(prefix + INDEX).unlink(missing_ok=True)
    sync(folder)
    for suffix in (TOKENS, NOTES):
        if suffix in partial:
            os.replace(partial[suffix], prefix + suffix)
    sync(folder)
    os.replace(partial[INDEX], prefix + INDEX)
    sync(folder)
