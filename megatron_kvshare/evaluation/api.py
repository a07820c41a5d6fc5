"""The public way to a trained model: ``from megatron_kvshare import load_model``."""

from __future__ import annotations

import atexit
import warnings
from pathlib import Path
from typing import Literal

import torch

from megatron_kvshare.checkpoint.reader import open_checkpoint, whole_model
from megatron_kvshare.checkpoint.tensors import TensorSource
from megatron_kvshare.conversion.folder import CONFIG
from megatron_kvshare.conversion.importing import open_folder
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import EXACT_RESIDUAL_FP32, exact_plan, solver_plan
from megatron_kvshare.spec.model_spec import ModelSpec

Mode = Literal["sweeps", "exact"]


class LoadedModel:
    """A whole model in fp32 on one device, ready to score tokens."""

    def __init__(self, model: KVShareGPT, spec: ModelSpec) -> None:
        self.model = model
        self.spec = spec

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def plan(self, mode: Mode, length: int) -> ExecutionPlan:
        """``sweeps``: as the model was trained; ``exact``: sweeps until nothing moves, which is
        what decoding token by token computes. Maps without upward layers know no difference."""
        about = self.spec
        if mode == "exact":
            return exact_plan(about.map, length, EXACT_RESIDUAL_FP32)
        if mode in ("sweeps", "passes"):  # the earlier word
            return solver_plan(about.map, about.recipe.for_length(length))
        rule = "the modes are sweeps (as in training) and exact (as in decoding)"
        raise ConfigError(Fault("mode", mode, rule, 'use mode="sweeps"'))

    @torch.no_grad()
    def logits(self, token_ids: torch.Tensor, mode: Mode = "sweeps") -> torch.Tensor:
        """``LongTensor [batch, seq] -> FloatTensor [batch, seq, vocab]``, on the model's device.

        Raises:
            ConfigError: a token outside the vocabulary, another shape, an unknown mode.
        """
        about = self.spec
        if token_ids.dim() != 2 or token_ids.numel() == 0 or token_ids.is_floating_point():
            rule = "token ids are whole numbers [batch, seq], at least one"
            fix = "for a single text use torch.tensor([ids])"
            shape = f"{token_ids.dtype} {tuple(token_ids.shape)}"
            raise ConfigError(Fault("token_ids", shape, rule, fix))
        least, most = int(token_ids.min()), int(token_ids.max())
        if least < 0 or most >= about.vocab_size:
            wrong = least if least < 0 else most
            rule = f"token ids of this model are 0 to {about.vocab_size - 1}"
            raise ConfigError(Fault("token_ids", wrong, rule, "use the model's own tokenizer"))
        plan = self.plan(mode, token_ids.shape[1])
        value = self.model(token_ids.to(self.device).long(), plan=plan).value
        return value[..., : about.vocab_size]


def load_model(path: str | Path, device: Literal["auto", "cpu"] = "auto") -> LoadedModel:
    """Load a native checkpoint (the ``--save`` folder of a run or one of its ``iter_*`` folders, of
    any layout) or a Hugging Face folder.

    No code in the folder is run. The first call starts a process group of one; ``auto`` takes a GPU
    if there is one.

    Raises:
        CheckpointError: nothing there that can be loaded, or it is damaged.
    """
    folder = Path(path)
    spec: ModelSpec
    source: TensorSource
    if (folder / CONFIG).is_file():
        found = open_folder(folder)
        for doubt in found.doubts:
            warnings.warn(doubt, stacklevel=2)
        spec, source = found.spec, found.weights
    else:
        stored = open_checkpoint(folder)
        for doubt in stored.doubts:
            warnings.warn(doubt, stacklevel=2)
        spec, source = stored.spec, stored.weights
    return LoadedModel(whole_model(spec, source, _alone(device)), spec)


def _alone(device: str) -> parallel.ParallelState:
    backend = "gloo" if device == "cpu" else "auto"
    if parallel.is_initialized():
        return parallel.current_state(parallel.activate(backend))
    atexit.register(parallel.destroy)
    return parallel.initialize(backend=backend)
