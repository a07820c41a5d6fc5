"""What commands have in common that all processes of a job run together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_kvshare.config.launch import speaks
from megatron_kvshare.errors import ConfigError


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """A configuration error inside is met by every process, and told by one.

    Raises:
        ConfigError: where this process tells it.
        SystemExit: on the others, with the same exit code.
    """
    try:
        yield
    except ConfigError as error:
        if speaks():
            raise
        raise SystemExit(error.exit_code) from None
