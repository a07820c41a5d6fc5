"""Proof that a Hugging Face folder and a native checkpoint are the same model (L5): its
description, every tensor bit by bit, and the logits of both on the same tokens."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kvshare.checkpoint.stored import StoredModel, whole_model
from megatron_kvshare.checkpoint.tensors import TensorSource
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.huggingface import export
from megatron_kvshare.huggingface import folder as folders
from megatron_kvshare.huggingface.settings import MODEL_TYPE, from_config
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.solver import solver_plan
from megatron_kvshare.sharing.weights import EMBEDDING, HEAD

LOGIT_LIMIT = 1e-5
"""Largest difference of fp32 logits, relative to the largest logit."""
BATCH, LENGTH = 2, 64


@dataclass(frozen=True)
class Verified:
    """``tensors`` are equal bit by bit; the logits differ by ``difference`` of the largest one,
    None where the folder's architecture has no code to run."""

    tensors: int
    difference: float | None

    def __str__(self) -> str:
        equal = f"{self.tensors} tensors are equal bit by bit"
        if self.difference is None:
            return f"{equal}; logits were not compared: the folder's architecture has no code here"
        return (
            f"{equal}; fp32 logits on {BATCH} x {LENGTH} tokens differ by {self.difference:.1e} "
            f"of the largest (limit {LOGIT_LIMIT:.0e})"
        )


def verify(stored: StoredModel, folder: Path, state: ParallelState) -> Verified:
    """Compare a checkpoint with a folder.

    Raises:
        CheckpointError: they are not the same model; every difference found is named.
    """
    config = folders.read_json(folder / folders.CONFIG)
    _same_description(stored, folder, config)
    weights = folders.HuggingFaceWeights(folder)
    count = _same_tensors(stored.weights, comparable(weights, stored.description.weights), folder)
    difference = None
    if runs_here(config):
        difference = logit_difference(stored, folder, config, state)
        if not difference <= LOGIT_LIMIT:
            rule = f"fp32 logits may differ by {LOGIT_LIMIT:.0e} of the largest"
            fix = "convert again; if it stays, report it with both config.json and kvshare.json"
            raise CheckpointError(Fault(str(folder), f"{difference:.2e}", rule, fix))
    return Verified(count, difference)


def runs_here(config: Mapping[str, Any]) -> bool:
    """Whether there is code for the folder's model: ours or that of transformers itself."""
    return config.get("model_type") in (MODEL_TYPE, "llama", "mistral")


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


def _same_description(stored: StoredModel, folder: Path, config: Mapping[str, Any]) -> None:
    mine, theirs = stored.description.identity, from_config(config).identity
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
    if config.get("model_type") == MODEL_TYPE:
        here = Path(export.__file__).parent
        faults += [
            Fault(
                str(folder / name),
                "changed",
                "it is not the file this version exports",
                "export again, or compare with the version that exported it",
            )
            for name in export.CODE
            if not (folder / name).is_file() or not filecmp.cmp(folder / name, here / name, False)
        ]
    if faults:
        raise CheckpointError(faults)


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
def logit_difference(
    stored: StoredModel, folder: Path, config: Mapping[str, Any], state: ParallelState
) -> float:
    """Largest difference of logits over the largest logit, the same random tokens through both."""
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, stored.description.model.max_positions)
    size = (BATCH, length)
    tokens = torch.randint(stored.description.vocab_size, size, generator=generator)
    theirs = _logits(folder, config, tokens)
    model = whole_model(stored.description, stored.weights, state)
    plan = solver_plan(stored.description.map, stored.description.recipe.for_length(length))
    mine = model(tokens.to(state.platform.device), plan=plan).value[..., : model.vocab_size].cpu()
    return float((mine - theirs).abs().max() / mine.abs().max())


def _logits(folder: Path, config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """By the modelling file of this package, which the folder's was compared with, or by
    transformers' own: no code of the folder runs."""
    from transformers import LlamaForCausalLM, MistralForCausalLM
    from transformers.utils import logging

    from megatron_kvshare.huggingface.modeling_kvshare import KVShareForCausalLM

    classes = {
        MODEL_TYPE: KVShareForCausalLM,
        "llama": LlamaForCausalLM,
        "mistral": MistralForCausalLM,
    }
    logging.disable_progress_bar()
    model = classes[config["model_type"]].from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32, local_files_only=True
    )
    return model.eval()(tokens, use_cache=False).logits
