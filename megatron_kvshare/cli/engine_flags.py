"""The flags of commands that run the engine: which model, and how the engine is set up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from megatron_kvshare.config.fields.types import SCHEMA, Count, Positive, dataclass
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.errors import Fault
from megatron_kvshare.serving.settings import EngineSettings, PrefillMode

if TYPE_CHECKING:
    from megatron_kvshare.serving.engine import Engine


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class ServedModel:
    """A model to generate text with."""

    load: str | None = None
    """The --save folder of a run, or one of its iter_* folders."""
    hf: str | None = None
    """Hugging Face folder, instead of --load."""
    tokenizer_model: str | None = None
    """Tokenizer; left out: the model's own."""
    trust_remote_code: bool = False
    """Run code that a tokenizer's folder brings along; never done otherwise."""
    tensor_model_parallel_size: Count = 1
    """Ranks that share the model; start as many with torchrun."""

    @property
    def path(self) -> str:
        return self.load or self.hf or ""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class EngineFlags:
    """How the engine is set up."""

    bf16: bool = False
    """Compute and keep the cache in bf16; left out: fp32."""
    max_length: Count | None = None
    """Tokens of a prompt and what follows; left out: as many as the model is declared for."""
    max_batch_size: Count = 16
    """Sequences that are generated at a time."""
    cache_gb: Positive | None = None
    """Size of the cache in 1e9 bytes, on each rank; left out: what --max-batch-size sequences of
    --max-length need, on a GPU most of what is free."""
    cache_tokens: Count | None = None
    """Size of the cache in tokens, instead of --cache-gb."""
    page_size: Annotated[int, Field(ge=1, le=65536)] = 128
    """Tokens of a page of the cache."""
    prefill_tokens: Count = 2048
    """About so many tokens of prompts are read in a step beside its decoding."""
    kv_prefill: PrefillMode = "trained"
    """How keys and values of a prompt are made where layers read above themselves."""
    prefix_reuse: bool = True
    """Prompts that begin alike share what is computed of their beginning."""
    cuda_graphs: bool = True
    """On a GPU, decoding steps are recorded once and replayed."""

    def settings(self) -> EngineSettings:
        """As the engine takes them.

        Raises:
            ConfigError: they contradict each other.
        """
        return EngineSettings(**{each.name: getattr(self, each.name) for each in fields(self)})


class _HasModel(Protocol):
    @property
    def model(self) -> ServedModel: ...


@rule("load hf")
def one_model(config: _HasModel) -> Iterator[Fault]:
    """It is in one place."""
    if (config.model.load is None) == (config.model.hf is None):
        what = "one model is loaded"
        yield Fault("--load, --hf", config.model.load, what, "give either --load or --hf")


_PATIENCE_MINUTES = 365 * 24 * 60.0
"""Ranks wait for the next request, however long nobody asks; one that dies is noticed at once."""


def start(model: ServedModel, settings: EngineSettings) -> Engine | None:
    """The engine, on the first rank; the others return None, once it has been closed.

    Raises:
        KVShareError: the model or its tokenizer cannot be loaded, or does not fit.
    """
    from megatron_kvshare.megatron_api import parallel, platform
    from megatron_kvshare.serving.load import open_model, start_engine

    opened = open_model(model.path, model.tokenizer_model, model.trust_remote_code)
    if parallel.is_initialized():
        state = parallel.current_state(platform.activate("auto"))
    else:
        tensor = model.tensor_model_parallel_size
        state = parallel.initialize(tensor, timeout_minutes=_PATIENCE_MINUTES)
    return start_engine(opened, settings, state)
