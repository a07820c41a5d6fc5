"""Hugging Face folder -> native checkpoint: read, translated, written aside, proven."""

from __future__ import annotations

import importlib.metadata
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_kvshare import __version__
from megatron_kvshare.checkpoint.manifest import Manifest, Progress
from megatron_kvshare.checkpoint.reader import (
    StoredModel,
    check_weights,
    native_model,
    open_checkpoint,
)
from megatron_kvshare.checkpoint.save import save_checkpoint
from megatron_kvshare.checkpoint.tensors import TensorSource
from megatron_kvshare.config import (
    DataConfig,
    PretrainConfig,
    SharingConfig,
)
from megatron_kvshare.config.flags.describe import as_dict
from megatron_kvshare.conversion import config_keys
from megatron_kvshare.conversion import folder as folders
from megatron_kvshare.conversion.export import ExportJob, export, written_aside
from megatron_kvshare.conversion.kv_init import KVInit, SharedKVWeights
from megatron_kvshare.conversion.own_code import code_files, foreign_code, refuse_foreign_code
from megatron_kvshare.conversion.settings import from_config
from megatron_kvshare.conversion.verify import (
    Verified,
    comparable,
    compare,
    runs_here,
    same_logits,
)
from megatron_kvshare.data.tokenizers import HuggingFaceTokenizer
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.spec.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """``sharing``: make a shared-KV model of it, with keys and values from ``kv_init``."""

    hf: Path
    save: Path
    sharing: SharingConfig | None = None
    kv_init: KVInit = KVInit.ALIGNED
    seed: int = 1234


@dataclass(frozen=True)
class HuggingFaceModel:
    """A folder that fits itself: configuration, tokenizer and weights belong together.

    ``missing``: what a complete folder would have besides; ``doubts``: what may make the model
    another than the folder's author meant.
    """

    folder: Path
    config: dict[str, Any]
    spec: ModelSpec
    weights: folders.HuggingFaceWeights
    missing: tuple[str, ...]
    doubts: tuple[str, ...]


def open_folder(folder: Path) -> HuggingFaceModel:
    """Open a folder, reading no weights yet.

    Raises:
        CheckpointError: with what is missing, damaged or cannot be built here.
    """
    config = folders.read_json(folder / folders.CONFIG)
    spec = from_config(config)
    weights = comparable(folders.HuggingFaceWeights(folder), spec.weight_shapes)
    check_weights(folder, weights.tensors, spec.weight_shapes)
    kinds = {info.dtype for info in weights.tensors.values()}
    model = replace(spec.model, bf16=kinds == {torch.bfloat16})
    missing = [name for name in code_files(config) if not (folder / name).is_file()]
    fingerprint = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = HuggingFaceTokenizer(folder)
        fingerprint = tokenizer.fingerprint
        if tokenizer.vocab_size > spec.vocab_size:
            rule = f"it has {tokenizer.vocab_size} ids, the embedding {spec.vocab_size}"
            fix = "give the tokenizer that belongs to the model"
            raise CheckpointError(Fault(str(folder / "tokenizer.json"), "too large", rule, fix))
    else:
        missing.append("tokenizer.json")
    spec = replace(spec, model=model, tokenizer=fingerprint)
    doubts = [f"{code.where} names {code.value}, which is not run" for code in foreign_code(folder)]
    doubts += config_keys.doubts(config)
    doubts += [
        f"{folder / name} is not read: transformers does not either" for name in weights.unread
    ]
    return HuggingFaceModel(folder, config, spec, weights, tuple(missing), tuple(doubts))


def shared(found: HuggingFaceModel, job: ImportJob) -> tuple[ModelSpec, TensorSource]:
    """What will be saved: the model as it is, or with the sharing that was asked for."""
    if job.sharing is None:
        return found.spec, found.weights
    about = found.spec
    spec = ModelSpec.of(about.model, job.sharing, about.vocab_size, about.tokenizer)
    if not any(spec.map.windowed):
        spec = replace(spec, window_size=None)
    weights = SharedKVWeights(found.weights, about, spec.map, job.kv_init, job.seed)
    return spec, weights


def import_folder(found: HuggingFaceModel, job: ImportJob, state: ParallelState) -> Verified:
    """Write ``job.save`` as a run would have and prove it; what is not proven gets no name.

    Raises:
        CheckpointError, MapError: the folder is in the way, the map does not fit, the proof fails.
        ConfigError: an export comes with other code than ours.
    """
    if found.config.get("model_type") == config_keys.MODEL_TYPE:
        refuse_foreign_code(found.folder, "restore the files that were exported")
    spec, source = shared(found, job)
    with written_aside(job.save) as aside:
        _save(spec, source, found, aside, state)
        return _prove(open_checkpoint(aside), found, job, state)


def _save(
    spec: ModelSpec,
    source: TensorSource,
    found: HuggingFaceModel,
    root: Path,
    state: ParallelState,
) -> None:
    model = native_model(spec, source, state)
    manifest = Manifest(
        identity=spec.identity,
        progress=Progress(),
        tensor_parallel=1,
        data_parallel=1,
        has_optimizer=False,
        config=_settings(spec, found),
        versions={
            "megatron_kvshare": __version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
    )
    save_checkpoint(root, manifest, [model], None, state)


def _settings(spec: ModelSpec, found: HuggingFaceModel) -> dict:
    """The settings a run would have, for the reader and for a later export."""
    sharing = SharingConfig(kv_map=spec.map.notation, window_size=spec.window_size)
    has_tokenizer = spec.tokenizer is not None
    data = DataConfig(
        tokenizer_type="HuggingFaceTokenizer" if has_tokenizer else "NullTokenizer",
        tokenizer_model=str(found.folder.resolve()) if has_tokenizer else None,
    )
    return as_dict(PretrainConfig(model=spec.model, sharing=sharing, data=data))


def _prove(
    stored: StoredModel, found: HuggingFaceModel, job: ImportJob, state: ParallelState
) -> Verified:
    """Against the folder where it can be run as it is, else against an export of the result; the
    model before it got another map, against the folder too."""
    runs = runs_here(found.config)
    if job.sharing is None and runs:
        return compare(stored, found.folder, state)
    if runs:
        same_logits(found.spec, found.weights, found.folder, found.config, state)
    with tempfile.TemporaryDirectory(dir=job.save.parent) as scratch:
        again = ExportJob(save=Path(scratch) / "again", without_tokenizer=True)
        return export(stored, again, state)
