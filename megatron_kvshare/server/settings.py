"""How the server is set up."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """``max_queue``: requests that may wait for the engine beside those that it runs; more are told
    to come back. ``drain_seconds``: how long open requests may go on after SIGTERM.
    ``stall_seconds``: how long a client may leave its answer unread, or its body unsent."""

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queue: int = 256
    max_body_bytes: int = 8 << 20
    drain_seconds: float = 30.0
    stall_seconds: float = 30.0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
