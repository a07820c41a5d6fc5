"""What is printed: no terminal, pipe or full disk behind it may end the work.

Everything goes through here that a run says while it trains.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO

PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
"""Errors that a disk has for a while; any other is one of the path that was given."""


def say(text: str, stream: TextIO | None = None) -> bool:
    """Print ``text`` (to standard output unless told otherwise) and whether it arrived; what cannot
    be written is dropped."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except OSError:
        drop_unwritten(stream)
        return False
    return True


def complain(text: str) -> bool:
    """:func:`say` on standard error."""
    return say(text, sys.stderr)


def drop_unwritten(stream: TextIO) -> None:
    """Forget what ``stream`` holds and cannot write: Python would try again at exit, and turn the
    exit code into 120."""
    try:
        number = stream.fileno()
        kept, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
    except OSError:
        return
    try:
        os.dup2(nowhere, number)
        stream.flush()
    finally:
        os.dup2(kept, number)
        os.close(kept)
        os.close(nowhere)
