"""An error on one rank ends all ranks (L5), so that no process waits for one that has gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_kvshare.errors import KVShareError
from megatron_kvshare.megatron_api.parallel import ParallelState, gather_objects
from megatron_kvshare.output import complain


@contextlib.contextmanager
def together(state: ParallelState) -> Iterator[None]:
    """Leave the block on all ranks or on none; the lowest rank with an error raises it, once.

    The block must not end in the middle of communication that other ranks still wait in.

    Raises:
        KVShareError: the error of this rank, where it is the first one.
        SystemExit: the error belongs to another rank, which reports it.
    """
    error: KVShareError | None = None
    try:
        yield
    except KVShareError as caught:
        error = caught
    codes = gather_objects(0 if error is None else error.exit_code)
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return
    if error is not None and failed[0] == state.rank:
        raise error
    raise SystemExit(codes[failed[0]])


def warn(state: ParallelState, *warnings: str) -> None:
    """Tell the user, once for all ranks."""
    if state.is_first:
        for warning in warnings:
            complain(f"warning: {warning}")
