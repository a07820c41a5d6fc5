"""``kvshare serve``: OpenAI's HTTP interface to a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_kvshare.cli.engine_flags import EngineFlags, ServedModel, one_model, start
from megatron_kvshare.config.fields.types import (
    SCHEMA,
    Index,
    NonNegative,
    Positive,
    Seconds,
    dataclass,
)
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.config.launch import speaks
from megatron_kvshare.output import complain
from megatron_kvshare.server.settings import ServerSettings, is_loopback

API_KEY = "KVSHARE_API_KEY"
_EXAMPLES = """\
  kvshare serve --hf runs/my/hf
  kvshare serve --load runs/my/checkpoint --bf16 --port 8001 --max-batch-size 64
  KVSHARE_API_KEY=... kvshare serve --hf runs/my/hf --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "The state of the union", "max_tokens": 32}'

OpenAI's clients take http://127.0.0.1:8000/v1 as base_url. SIGTERM and Ctrl-C let open requests
finish; a second one does not. What clients may ask for: docs/serving.md."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class ServeConfig:
    """A model, and how it is served."""

    model: ServedModel = field(default_factory=ServedModel)
    engine: EngineFlags = field(default_factory=EngineFlags)
    host: str = "127.0.0.1"
    """Address to listen at: this machine alone; 0.0.0.0: every network it is in."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port; 0: a free one."""
    api_key: str | None = None
    """Key that clients must send; better given as KVSHARE_API_KEY, which `ps` does not show."""
    model_name: str | None = None
    """What clients call the model; left out: the name of its folder."""
    max_queue: Index = 256
    """Choices that may wait beside those of --max-batch-size; more are told to come back (429)."""
    max_body_mb: Positive = 8.0
    """Largest body of a request, in 1e6 bytes."""
    drain_seconds: NonNegative = 30.0
    """How long open requests may go on after SIGTERM."""
    stall_seconds: Seconds = 30.0
    """A client that leaves its answer unread, or its body unsent, for so long is let go."""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command = Command(
        "kvshare serve", "Serve a model as OpenAI's API does.", _EXAMPLES, rules=(one_model,)
    )
    config = parse(ServeConfig, argv, command)
    settings, engine_settings = _settings(config), config.engine.settings()
    from megatron_kvshare.server.listening import Server, bound

    listener = bound(settings) if speaks() else None
    engine = start(config.model, engine_settings)
    if engine is not None and listener is not None:
        _warn(settings)
        Server(engine, settings).serve_until_stopped(listener)
    return 0


def _settings(config: ServeConfig) -> ServerSettings:
    name = config.model_name or Path(config.model.path).resolve().name
    return ServerSettings(
        model_name=name,
        host=config.host,
        port=config.port,
        api_key=config.api_key or os.environ.get(API_KEY) or None,
        max_queue=config.max_queue,
        max_body_bytes=int(config.max_body_mb * 1e6),
        drain_seconds=config.drain_seconds,
        stall_seconds=config.stall_seconds,
    )


def _warn(settings: ServerSettings) -> None:
    if settings.api_key is None and not is_loopback(settings.host):
        complain(
            f"warning: whoever reaches {settings.host} can use this model: there is no key"
            f" (--api-key, or {API_KEY} in the environment)"
        )
