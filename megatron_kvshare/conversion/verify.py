"""Proof that a Hugging Face folder and a native checkpoint are the same model: its
description, every tensor bit by bit, and the logits of both on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_kvshare.checkpoint.reader import StoredModel, whole_model
from megatron_kvshare.checkpoint.tensors import TensorSource
from megatron_kvshare.conversion import folder as folders
from megatron_kvshare.conversion.config_keys import LLAMA, MISTRAL, MODEL_TYPE
from megatron_kvshare.conversion.own_code import CODE, is_present
from megatron_kvshare.conversion.settings import from_config
from megatron_kvshare.costs.weights import EMBEDDING, HEAD
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.megatron_api.memory import shortage
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.solver import solver_plan
from megatron_kvshare.spec.model_spec import ModelSpec

LOGIT_LIMIT = 1e-5
"""Largest difference of fp32 logits, relative to the largest logit."""
SENSITIVE_LIMIT = 1e-3
"""The same for models that magnify rounding: four times what the last bit of the embeddings makes,
and never more than this. Keys and values averaged over many layers make such models (30 layers,
pizza-bottom from a pretrained model: 2e-5, whichever of the two programs computes it)."""
BATCH, LENGTH = 2, 64
_WINDOWS = {MODEL_TYPE: "kv_window_size", MISTRAL: "sliding_window"}
"""Where config.json says how wide the windows are."""


@dataclass(frozen=True)
class LogitDifference:
    """Relative to the largest logit."""

    value: float
    limit: float

    def __str__(self) -> str:
        why = ", four times the effect of the embeddings' last bit"
        return (
            f"fp32 logits on {BATCH} x {LENGTH} tokens differ by {self.value:.1e} of the largest "
            f"(limit {self.limit:.0e}{why if self.limit > LOGIT_LIMIT else ''})"
        )


@dataclass(frozen=True)
class Verified:
    """``tensors`` are equal bit by bit; ``difference`` is None where the folder's architecture has
    no code to run."""

    tensors: int
    difference: LogitDifference | None

    def __str__(self) -> str:
        equal = f"{self.tensors} tensors are equal bit by bit"
        if self.difference is None:
            return f"{equal}; logits were not compared: the folder's architecture has no code here"
        return f"{equal}; {self.difference}"


def verify(stored: StoredModel, folder: Path, state: ParallelState) -> Verified:
    """Compare a checkpoint with a folder, of this version's own where it is one of ours.

    Raises:
        CheckpointError: they are not the same model; every difference found is named.
    """
    config = folders.read_json(folder / folders.CONFIG)
    if config.get("model_type") == MODEL_TYPE:
        _present_code(folder)
    return compare(stored, folder, state)


def compare(stored: StoredModel, folder: Path, state: ParallelState) -> Verified:
    """The same, where the folder's modelling file may be that of an earlier version: this version's
    is what runs.

    Raises:
        CheckpointError: they are not the same model; every difference found is named.
    """
    config = folders.read_json(folder / folders.CONFIG)
    _same_spec(stored, folder, config)
    weights = folders.HuggingFaceWeights(folder)
    count = _same_tensors(stored.weights, comparable(weights, stored.spec.weight_shapes), folder)
    difference = None
    if runs_here(config):
        difference = same_logits(stored.spec, stored.weights, folder, config, state)
    return Verified(count, difference)


def runs_here(config: Mapping[str, Any]) -> bool:
    """Whether there is code for the folder's model: ours or that of transformers itself."""
    return config.get("model_type") in (MODEL_TYPE, LLAMA, MISTRAL)


def comparable(
    weights: folders.HuggingFaceWeights, wanted: Mapping[str, tuple[int, ...]]
) -> folders.HuggingFaceWeights:
    """Without what a folder may hold besides: a tied head that repeats the embedding, and
    frequencies, which are computed.

    Raises:
        CheckpointError: the head of a model with tied embeddings is another than the embedding.
    """
    for name in list(weights.tensors):
        if name == HEAD and HEAD not in wanted and EMBEDDING in weights.tensors:
            if not torch.equal(weights.read(HEAD), weights.read(EMBEDDING)):
                rule = "config.json ties it to the embedding, but it is another tensor"
                fix = "set tie_word_embeddings to false in config.json"
                raise CheckpointError(Fault(f"{weights.folder}: {HEAD}", "untied", rule, fix))
            del weights.tensors[name]
        if name.endswith("rotary_emb.inv_freq"):
            del weights.tensors[name]
    return weights


def _same_spec(stored: StoredModel, folder: Path, config: Mapping[str, Any]) -> None:
    mine, theirs = stored.spec.identity, from_config(config).identity
    faults = [
        Fault(
            f"{folder / folders.CONFIG}: {name}",
            theirs.get(name),
            f"the checkpoint has {value!r}",
            "convert again",
        )
        for name, value in mine.items()
        if name != "tokenizer" and theirs.get(name) != value
    ]
    if faults:
        raise CheckpointError(faults)


def _present_code(folder: Path) -> None:
    rule = "it is not the file this version exports"
    fix = "export again, or compare with the version that exported it"
    different = [folder / name for name in CODE if not is_present(folder / name)]
    if different:
        raise CheckpointError([Fault(str(file), "changed", rule, fix) for file in different])


def _same_tensors(mine: TensorSource, theirs: TensorSource, folder: Path) -> int:
    different = mine.tensors.keys() ^ theirs.tensors.keys()
    for name in mine.tensors.keys() & theirs.tensors.keys():
        if not _same_bits(mine.read(name), theirs.read(name)):
            different |= {name}
    if different:
        rule = f"{len(different)} tensors are not those of the checkpoint: {sorted(different)[:4]}"
        raise CheckpointError(Fault(str(folder), len(different), rule, "convert again"))
    return len(mine.tensors)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compared as bytes, so that NaN equals NaN and 0 differs from -0."""
    raw = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and torch.equal(*raw)


@torch.no_grad()
def same_logits(
    spec: ModelSpec,
    weights: TensorSource,
    folder: Path,
    config: Mapping[str, Any],
    state: ParallelState,
) -> LogitDifference:
    """The same random tokens through both models.

    Raises:
        CheckpointError: they differ by more than rounding, or the folder's cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, spec.model.max_positions)
    tokens = torch.randint(spec.vocab_size, (BATCH, length), generator=generator)
    spec, narrow = _narrowed(spec, config, length)
    theirs = _logits(folder, config, narrow, tokens)
    model = whole_model(spec, weights, state)
    plan = solver_plan(spec.map, spec.recipe.for_length(length))

    def run() -> torch.Tensor:
        logits = model(tokens.to(state.platform.device), plan=plan).value
        return logits[..., : spec.vocab_size].cpu()

    mine = run()
    value, limit = _relative(mine, theirs), LOGIT_LIMIT
    if value > limit:
        _turn_last_bits(model.shared_embedding_or_output_weight(), generator)
        limit = min(max(limit, 4 * _relative(mine, run())), SENSITIVE_LIMIT)
    if not value <= limit:  # NaN too
        rule = f"fp32 logits may differ by {limit:.0e} of the largest"
        fix = "convert again; if it stays, report it with both config.json and kvshare.json"
        raise CheckpointError(Fault(str(folder), f"{value:.2e}", rule, fix))
    return LogitDifference(value, limit)


def _narrowed(
    spec: ModelSpec, config: Mapping[str, Any], length: int
) -> tuple[ModelSpec, dict[str, int]]:
    """Windows, whose width the descriptions agree on, made narrower for both models where the
    tokens would not reach their end: (the native description, changes of the folder's)."""
    if spec.window_size is None or not any(spec.map.windowed):
        return spec, {}
    window = min(spec.window_size, max(length // 4, 1))
    return replace(spec, window_size=window), {_WINDOWS[config["model_type"]]: window}


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _turn_last_bits(weight: torch.Tensor, generator: torch.Generator) -> None:
    """Change fp32 values by a unit in the last place, up or down, or not at all."""
    turns = torch.randint(-1, 2, weight.shape, generator=generator).to(weight.device)
    weight.mul_(1 + turns * torch.finfo(torch.float32).eps)


def _logits(
    folder: Path, config: Mapping[str, Any], changes: Mapping[str, int], tokens: torch.Tensor
) -> torch.Tensor:
    """By the modelling file of this package, which the folder's was compared with, or by
    transformers' own: no code of the folder runs."""
    from transformers import LlamaForCausalLM, MistralForCausalLM
    from transformers.utils import logging

    from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM

    classes = {
        MODEL_TYPE: KVShareForCausalLM,
        LLAMA: LlamaForCausalLM,
        MISTRAL: MistralForCausalLM,
    }
    logging.disable_progress_bar()
    usual = {"attn_implementation": "sdpa", "dtype": torch.float32, "local_files_only": True}
    try:
        model = classes[config["model_type"]].from_pretrained(folder, **usual, **changes)
        logits: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    except Exception as error:  # it raises nearly anything for a file that it cannot use
        if shortage(error):
            raise
        rule = f"transformers cannot load and run it: {error}"
        fix = "mend config.json; it has to run there too"
        raise CheckpointError(Fault(str(folder), type(error).__name__, rule, fix)) from error
    return logits
