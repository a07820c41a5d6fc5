"""An engine over a tiny model, with the logits of every token it draws on record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_kvshare.megatron_api.linear import read_for_few_rows
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.load import new_cache
from megatron_kvshare.serving.request import FinishReason, Output, Request, Sampling
from megatron_kvshare.serving.runner import WorkerRunner
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.serving.step import Step
from megatron_kvshare.serving.worker import StepResult, Worker
from megatron_kvshare.sharing.map import SharingMap
from tests.product import Tiny, load_by_name


class Recorder(WorkerRunner):
    """Keeps the logits that each sequence was given, in order, and the steps."""

    def __init__(self, worker: Worker, state: ParallelState) -> None:
        super().__init__(worker, state)
        self.logits: dict[int, list[Tensor]] = defaultdict(list)
        self.steps: list[Step] = []

    def run(self, step: Step) -> StepResult:
        self.steps.append(step)
        result = super().run(step)
        for sequence, row in zip(result.sequences, result.logits, strict=True):
            self.logits[sequence].append(row.clone())
        return result


def tiny_engine(
    tiny: Tiny,
    sharing: SharingMap,
    state: ParallelState,
    weights: dict[str, Tensor],
    **settings: object,
) -> Engine:
    chosen = EngineSettings(**{"page_size": 4, "max_length": 64, **settings})  # type: ignore[arg-type]
    model = tiny.model(sharing, state).eval()
    load_by_name(model, weights)
    read_for_few_rows(model.parameters())
    runner = Recorder(Worker(model, new_cache(model, chosen, state)), state)
    return Engine(model.spec, runner, chosen)


def ask(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
) -> list[list[int]]:
    """All at once; the new tokens of each prompt."""
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    for number, (prompt, how) in enumerate(zip(prompts, each, strict=True)):
        engine.submit(Request(id=str(number), prompt=tuple(prompt), sampling=how))
    tokens: list[list[int]] = [[] for _ in prompts]
    ended: dict[str, FinishReason] = {}
    for output in drain(engine):
        assert output.id not in ended, "it had ended"
        tokens[int(output.id)] += output.tokens
        if output.finished:
            ended[output.id] = output.finished
    assert len(ended) == len(prompts)
    return tokens


def drain(engine: Engine, most: int = 2000) -> list[Output]:
    outputs = []
    for _ in range(most):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
    raise AssertionError(f"the engine still has work after {most} steps")


def greedy(tokens: int) -> Sampling:
    return replace(Sampling(temperature=0.0, ignore_eos=True), max_tokens=tokens)


def prompts_of(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=draw).tolist() for n in lengths]
