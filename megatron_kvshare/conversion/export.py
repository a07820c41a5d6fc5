"""Native checkpoint -> Hugging Face folder: written aside, proven, then renamed."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_kvshare.checkpoint.reader import StoredModel
from megatron_kvshare.conversion import folder as folders
from megatron_kvshare.conversion.card import model_card
from megatron_kvshare.conversion.own_code import CODE, HERE
from megatron_kvshare.conversion.settings import is_plain_llama, to_config
from megatron_kvshare.conversion.tokenizer import write_tokenizer
from megatron_kvshare.conversion.tokenizer_proof import prove_tokenizer
from megatron_kvshare.conversion.verify import Verified, verify
from megatron_kvshare.data.tokenizers import Tokenizer, kind_of, load_tokenizer
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.ownership.aside import aside, remove, remove_leftovers
from megatron_kvshare.ownership.owner import file_place, owned


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What to write besides the weights. ``tokenizer_model`` None: the one of the training;
    ``trust_remote_code``: run code of its folder where it needs that."""

    save: Path
    tokenizer_model: str | None = None
    trust_remote_code: bool = False
    without_tokenizer: bool = False
    max_shard_bytes: int = folders.MAX_SHARD_BYTES


class _Tokenizer(NamedTuple):
    """The tokenizer of the training, and the file or folder that it is read from."""

    trained: Tokenizer
    path: Path


def export(
    stored: StoredModel,
    job: ExportJob,
    state: ParallelState,
    done: Callable[[int, int], None] = lambda written, of: None,
) -> Verified:
    """Write the folder ``job.save``. It gets its name only once :func:`verify` has found in it the
    model of the checkpoint; what that compared is returned.

    Raises:
        CheckpointError: the folder is in the way, the tokenizer is not that of the training, the
            model in the folder is another, ...
    """
    tokenizer = _tokenizer(stored, job)
    with written_aside(job.save) as partial:
        _write(stored, job, tokenizer, partial, done)
        return verify(stored, partial, state)


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that gets its name once the block has ended well, else vanishes.

    Raises:
        CheckpointError: ``target`` is there and not empty.
        OwnershipError: another process writes it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        rule, fix = "there is something already", "give a new folder, or remove it first"
        raise CheckpointError(Fault("--save", str(target), rule, fix))
    partial = aside(target)
    try:
        with owned(file_place("--save", str(target))):
            remove_leftovers(target.parent, re.escape(target.name))
            partial.mkdir()
            yield partial
            if target.exists():
                target.rmdir()
            partial.rename(target)
    except OSError as error:
        fix = "free space or permissions there, or choose another folder"
        rule = f"it cannot be written: {error}"
        raise CheckpointError(Fault("--save", str(target), rule, fix)) from error
    finally:
        remove(partial)


def _write(
    stored: StoredModel,
    job: ExportJob,
    tokenizer: _Tokenizer | None,
    folder: Path,
    done: Callable[[int, int], None],
) -> None:
    spec = stored.spec
    written = write_tokenizer(tokenizer.trained, tokenizer.path, folder) if tokenizer else None
    tokens = written.ids if written else {}
    config = to_config(spec, weights_dtype(stored), tokens)
    folders.write_json(folder / folders.CONFIG, config)
    if tokenizer and written:
        prove_tokenizer(tokenizer.trained, folder, written.rules)
    generation = {"_from_model_config": True, "do_sample": False, **tokens}
    folders.write_json(folder / "generation_config.json", generation)
    if not is_plain_llama(spec.map):
        for name in CODE:
            shutil.copyfile(HERE / name, folder / name)
    card = model_card(stored.manifest, spec, job.save.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    folders.write_weights(stored.weights, folder, job.max_shard_bytes, done)


def weights_dtype(stored: StoredModel) -> torch.dtype:
    """The one type of all weights."""
    kinds = {info.dtype for info in stored.weights.tensors.values()}
    assert len(kinds) == 1, "weights of several types"
    return kinds.pop()


def _tokenizer(stored: StoredModel, job: ExportJob) -> _Tokenizer | None:
    """The tokenizer of the training, or None where it had none or is not wanted."""
    trained_with, settings = stored.spec.tokenizer, stored.manifest.config
    path = job.tokenizer_model or settings.get("tokenizer_model")
    if job.without_tokenizer or (path is None and trained_with is None):
        return None
    fix = "give --tokenizer-model PATH, or --without-tokenizer"
    if path is None or not Path(path).exists():
        rule = "the tokenizer of the training is not there any more"
        raise CheckpointError(Fault("--tokenizer-model", path, rule, fix))
    kind = settings.get("tokenizer_type") or "SentencePieceTokenizer"
    if job.tokenizer_model is not None:
        kind = kind_of(path)
    tokenizer = load_tokenizer(kind, path, trust_remote_code=job.trust_remote_code)
    if trained_with not in (None, tokenizer.fingerprint):
        rule = "it is another tokenizer than that of the training"
        raise CheckpointError(Fault("--tokenizer-model", path, rule, fix))
    if tokenizer.vocab_size > stored.spec.vocab_size:
        rule = f"it has {tokenizer.vocab_size} ids, the embedding {stored.spec.vocab_size}"
        raise CheckpointError(Fault("--tokenizer-model", path, rule, fix))
    return _Tokenizer(tokenizer, Path(path))
