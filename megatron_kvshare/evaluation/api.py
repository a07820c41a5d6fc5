"""The public way to a trained model: ``from megatron_kvshare import load_model``."""

from __future__ import annotations

import atexit
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_kvshare.checkpoint.reader import whole_model
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.megatron_api.linear import read_for_few_rows
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.generate import Generated, generate
from megatron_kvshare.serving.load import Opened, new_cache, new_runner, open_model
from megatron_kvshare.serving.request import Sampling
from megatron_kvshare.serving.settings import EngineSettings, PrefillMode
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import EXACT_RESIDUAL_FP32, exact_plan, solver_plan

Mode = Literal["sweeps", "exact"]


class LoadedModel:
    """A whole model in fp32 on one device, ready to score tokens and to write."""

    def __init__(self, model: KVShareGPT, opened: Opened, state: parallel.ParallelState) -> None:
        self.model = model
        self.spec = opened.spec
        self._opened = opened
        self._state = state

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

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        kv_prefill: PrefillMode = "trained",
        max_batch_size: int = 16,
        **sampling: Any,
    ) -> list[Generated]:
        """What follows each prompt: texts, or token ids.

        ``sampling``: fields of :class:`megatron_kvshare.serving.request.Sampling`, for example
        ``max_tokens=64, temperature=0``; ``kv_prefill``: see
        :class:`megatron_kvshare.serving.settings.EngineSettings`.

        Raises:
            ConfigError: a setting, or a prompt, that cannot be; with everything that is wrong.
            DataError: a text is given, and the tokenizer cannot be loaded.
        """
        if isinstance(prompts, str):
            rule, fix = "prompts are a list", "use [prompt] for a single one"
            raise ConfigError(Fault("prompts", prompts, rule, fix))
        fields = {each.name for each in dataclasses.fields(Sampling)}
        unknown = sorted(sampling.keys() - fields)
        if unknown:
            fix = f"use some of {', '.join(sorted(fields))}"
            raise ConfigError([Fault(name, sampling[name], "unknown", fix) for name in unknown])
        asked = Sampling(**sampling)
        settings = EngineSettings(
            kv_prefill=kv_prefill, max_batch_size=max(1, min(len(prompts), max_batch_size))
        )
        cache = new_cache(self.model, settings, self._state)
        runner = new_runner(self.model, cache, settings, self._state)
        engine = Engine(self.spec, runner, settings, *self._opened.text())
        return generate(engine, prompts, asked)


def load_model(path: str | Path, device: Literal["auto", "cpu"] = "auto") -> LoadedModel:
    """Load a native checkpoint (the ``--save`` folder of a run or one of its ``iter_*`` folders, of
    any layout) or a Hugging Face folder.

    No code in the folder is run. The first call starts a process group of one; ``auto`` takes a GPU
    if there is one.

    Raises:
        CheckpointError: nothing there that can be loaded, or it is damaged.
    """
    opened = open_model(path)
    state = _alone(device)
    model = whole_model(opened.spec, opened.weights, state)
    read_for_few_rows(model.parameters())
    return LoadedModel(model, opened, state)


def _alone(device: str) -> parallel.ParallelState:
    backend = "gloo" if device == "cpu" else "auto"
    if parallel.is_initialized():
        return parallel.current_state(parallel.activate(backend))
    atexit.register(parallel.destroy)
    return parallel.initialize(backend=backend)
