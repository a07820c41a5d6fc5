"""What the engine computes: decoding with a cache equals the model's own definition, token by
token, for any map and whatever happens to a sequence on the way."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.request import Sampling
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import CONVERGED_PREFILL, solver_plan
from tests.parity.cases import one_of_each_pattern
from tests.product import Tiny
from tests.serving import ask, greedy, prompts_of, tiny_engine

TINY = Tiny()
NEW = 9
TOLERANCE = 1e-5


class Asked(NamedTuple):
    weights: dict[str, Tensor]
    prompts: list[list[int]]


def asked(sharing: SharingMap) -> Asked:
    """Ragged prompts: shorter than a page, a page, longer than the window; two begin alike."""
    prompts = prompts_of((1, 3, 8, 13), TINY.vocabulary)
    prompts.append([*prompts[3][:9], 5, 6])
    return Asked(TINY.weights(sharing), prompts)


def recorded(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens of each prompt, and the logits ``[new, vocabulary]`` they were drawn from."""
    first = len(engine.runner.logits)
    answers = ask(engine, prompts, greedy(NEW))
    numbers = range(first, first + len(prompts))
    assert engine.stats().free_pages == engine.stats().pages, "pages are lost"
    return answers, [torch.stack(engine.runner.logits[number]) for number in numbers]


def naive_logits(sharing: SharingMap, case: Asked, answers: list[list[int]]) -> list[Tensor]:
    naive = TINY.oracle(sharing, case.weights)
    return [
        naive.token_by_token(torch.tensor([[*prompt, *new]]))[0, len(prompt) - 1 : -1]
        for prompt, new in zip(case.prompts, answers, strict=True)
    ]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for number, (mine, right) in enumerate(zip(got, wanted, strict=True)):
        difference = (mine.double() - right.double()).abs().max()
        assert difference <= tolerance * right.abs().max(), f"prompt {number}: {difference}"


@one_of_each_pattern()
def test_equals_the_model_token_by_token(sharing: SharingMap, single) -> None:
    """More requests than run at a time, in pages that hold what others have left; then in a cache
    that is too small for two, so that sequences are set aside and come back, with prompts in
    chunks whose first pages others have made."""
    case = asked(sharing)
    roomy = tiny_engine(TINY, sharing, single, case.weights, kv_prefill="exact", max_batch_size=3)
    answers, logits = recorded(roomy, case.prompts)
    wanted = naive_logits(sharing, case, answers)
    assert answers == [each.argmax(-1).tolist() for each in wanted]
    assert_close(logits, wanted)
    narrow = tiny_engine(
        TINY,
        sharing,
        single,
        case.weights,
        kv_prefill="exact",
        prefill_tokens=6,
        cache_tokens=32,
        page_size=2,
    )
    again, logits = recorded(narrow, case.prompts)
    assert again == answers
    assert_close(logits, wanted)
    assert narrow.stats().preempted > 0
    assert any(chunk.start for step in narrow.runner.steps for chunk in step.chunks)
    windowed = any(group.window for group in narrow.runner.layout.groups)
    assert windowed or narrow.stats().reused_tokens > 0
