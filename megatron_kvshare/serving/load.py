"""From a checkpoint or a Hugging Face folder to a running engine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_kvshare.checkpoint.reader import (
    model_without_stages,
    open_checkpoint,
    without_training,
)
from megatron_kvshare.checkpoint.tensors import TensorSource
from megatron_kvshare.conversion.folder import CONFIG, read_json
from megatron_kvshare.conversion.importing import open_folder
from megatron_kvshare.data.tokenizers import Tokenizer, kind_of, load_tokenizer
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.kernels.choice import on_gpu
from megatron_kvshare.megatron_api.linear import read_for_few_rows
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.serving.cache import PagedCache
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.layout import CacheLayout
from megatron_kvshare.serving.runner import WorkerRunner
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.serving.worker import Worker
from megatron_kvshare.spec.model_spec import ModelSpec

TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_FREE_MEMORY = 0.85
"""Of what a GPU has left beside the weights; the rest is for a step's own tensors."""


class TokenizerPlace(NamedTuple):
    """Where a tokenizer is; ``kind`` by Megatron's name, ``path`` None for one without a file."""

    kind: str
    path: str | None
    vocab_size: int
    trust_remote_code: bool = False

    def load(self) -> Tokenizer:
        """Raises :class:`DataError`: it is missing or broken."""
        return load_tokenizer(
            self.kind,
            self.path,
            self.vocab_size,
            split_special_tokens=self._splits_special_tokens(),
            trust_remote_code=self.trust_remote_code,
        )

    def _splits_special_tokens(self) -> bool:
        """As transformers reads it of that folder: exports say there how training read texts."""
        if self.kind != "HuggingFaceTokenizer" or self.path is None:
            return False
        place = Path(self.path)
        settings = (place if place.is_dir() else place.parent) / TOKENIZER_CONFIG
        return settings.is_file() and bool(read_json(settings).get("split_special_tokens"))


class Opened(NamedTuple):
    """A model that has not been built. ``named_eos``: tokens that end a text, as far as the
    folder's files say."""

    spec: ModelSpec
    weights: TensorSource
    tokenizer: TokenizerPlace | None
    named_eos: tuple[int, ...] = ()

    def text(self) -> Text:
        """Load what turns tokens into text."""
        tokenizer = None if self.tokenizer is None else self.tokenizer.load()
        eos = self.named_eos
        if not eos and tokenizer is not None and tokenizer.eod is not None:
            eos = (tokenizer.eod,)
        return Text(tokenizer, eos)


class Text(NamedTuple):
    """``eos``: the tokens that end a text."""

    tokenizer: Tokenizer | None
    eos: tuple[int, ...]


def open_model(
    path: str | Path, tokenizer_model: str | None = None, trust_remote_code: bool = False
) -> Opened:
    """Open a checkpoint (the ``--save`` folder of a run or one of its ``iter_*`` folders) or a
    Hugging Face folder; no code in it is run. What is doubtful about it is a warning.

    Raises:
        CheckpointError: nothing there that can be loaded, or it is damaged.
    """
    folder = Path(path)
    kind, model = "HuggingFaceTokenizer", None
    eos: tuple[int, ...] = ()
    spec: ModelSpec
    weights: TensorSource
    if (folder / CONFIG).is_file():
        found = open_folder(folder)
        spec, weights, doubts = found.spec, found.weights, found.doubts
        if (folder / "tokenizer.json").is_file():
            model = str(folder)
        eos = _eos_of(folder)
    else:
        stored = open_checkpoint(folder)
        spec, weights, doubts = stored.spec, stored.weights, stored.doubts
        settings = stored.manifest.config
        kind, model = settings["tokenizer_type"], settings["tokenizer_model"]
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    if tokenizer_model is not None:
        kind, model = kind_of(tokenizer_model), tokenizer_model
    if model is None and kind != "NullTokenizer":
        return Opened(spec, weights, None, eos)
    place = TokenizerPlace(kind, model, spec.vocab_size, trust_remote_code)
    return Opened(spec, weights, place, eos)


def start_engine(opened: Opened, settings: EngineSettings, state: ParallelState) -> Engine | None:
    """Build the model on this rank. Rank 0 returns the engine; the others return None, once it has
    been closed.

    Raises:
        ConfigError: the settings do not fit the model, or the cache does not hold anything.
    """
    text = opened.text()
    model = serving_model(opened.spec, opened.weights, settings.bf16, state)
    runner = new_runner(model, new_cache(model, settings, state), settings, state)
    if not state.is_first:
        runner.follow()
        return None
    return Engine(opened.spec, runner, settings, *text)


def new_runner(
    model: KVShareGPT, cache: PagedCache, settings: EngineSettings, state: ParallelState
) -> WorkerRunner:
    """What carries out steps on this rank: on a GPU by graphs, where they can be recorded."""
    worker = Worker(model, cache)
    if settings.cuda_graphs and worker.follows_table and state.tp_size == 1:
        length = settings.max_length or model.spec.model.max_positions
        worker.record_graphs(settings.max_batch_size, length)
    return WorkerRunner(worker, state)


def serving_model(
    spec: ModelSpec, weights: TensorSource, bf16: bool, state: ParallelState
) -> KVShareGPT:
    """This rank's part of the model, without what only training needs."""
    if state.pp_size > 1:
        rule = "a token goes through all layers, and keys and values between them, on every rank"
        fix = "use --tensor-model-parallel-size instead"
        raise ConfigError(Fault("--pipeline-model-parallel-size", state.pp_size, rule, fix))
    model = model_without_stages(without_training(spec, bf16), weights, state)
    read_for_few_rows(model.parameters())
    return model.eval()


def new_cache(model: KVShareGPT, settings: EngineSettings, state: ParallelState) -> PagedCache:
    """As large as the settings say, or as there is room for."""
    spec, dtype = model.spec, model.config.params_dtype
    layout = CacheLayout.of(spec, settings.page_size, dtype.itemsize, state.tp_size)
    length = settings.max_length or spec.model.max_positions
    device = state.platform.device
    if settings.cache_tokens is not None:
        pages = layout.pages_for(settings.cache_tokens, length)
    elif settings.cache_gb is not None:
        pages = layout.pages_within(int(settings.cache_gb * 1e9), length)
    elif on_gpu(device):
        free = torch.tensor(torch.cuda.mem_get_info(device)[0], dtype=torch.float64)
        pages = layout.pages_within(int(_least(free, state) * _OF_FREE_MEMORY), length)
    else:
        pages = layout.pages_for(settings.max_batch_size * length, length)
    if min(pages) < 1:
        rule = f"it does not hold a page of {layout.page_size} tokens for every layer's cache"
        value = settings.cache_gb if settings.cache_tokens is None else settings.cache_tokens
        fix = "give it more room, or use a smaller --page-size"
        raise ConfigError(Fault("the cache", value, rule, fix))
    return PagedCache(layout, pages, spec.model.head_dim, dtype, device)


def _least(value: torch.Tensor, state: ParallelState) -> float:
    """Over the tensor-parallel ranks."""
    value = value.to(state.platform.device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN, state.tp_group)
    return float(value)


def _eos_of(folder: Path) -> tuple[int, ...]:
    """What the folder's files say; ``generation_config.json`` first, as transformers does."""
    for name in ("generation_config.json", CONFIG):
        if (folder / name).is_file():
            named = read_json(folder / name).get("eos_token_id")
            if named is not None:
                ids: Sequence[int] = named if isinstance(named, list) else [named]
                return tuple(ids)
    return ()
