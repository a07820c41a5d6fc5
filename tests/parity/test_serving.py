"""What the engine computes: decoding with a cache equals the model's own definition, token by
token, for any map and whatever happens to a sequence on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from megatron_kvshare.serving import worker
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.request import Request
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import CONVERGED_PREFILL, solver_plan
from tests import gpu_kernels
from tests.parity.cases import one_of_each_pattern
from tests.product import Tiny
from tests.serving import ask, drain, greedy, prompts_of, tiny_engine

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


CYCLIC = build_map(8, "sandwich-top", 3)
WINDOWED = build_map(8, kv_map="0s_4_4s_4_4s_0s_7s_7")


def forward_logits(model, tokens: list[int], plan) -> Tensor:
    """``[tokens, vocabulary]`` of the model that trains."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), plan=plan).value[0]
    return logits[:, : TINY.vocabulary]


@pytest.mark.parametrize("sharing", [CYCLIC, WINDOWED, build_map(8, "pizza-bottom", 3)], ids=str)
def test_trained_prefill_is_the_forward_of_training(sharing: SharingMap, single) -> None:
    """Whole prompts, several of one length together, and the layers above the last producer for the
    last token alone; whatever the budget of a step, such a prompt is not cut."""
    case = asked(sharing)
    prompts = prompts_of((9, 9, 14, 3), TINY.vocabulary)
    engine = tiny_engine(
        TINY, sharing, single, case.weights, kv_prefill="trained", prefill_tokens=20
    )
    ask(engine, prompts, greedy(1))
    spec = engine.spec
    for number, prompt in enumerate(prompts):
        plan = solver_plan(sharing, spec.recipe.for_length(len(prompt)))
        wanted = forward_logits(engine.runner.worker.model, prompt, plan)[-1]
        assert_close([engine.runner.logits[number][0]], [wanted])
    cut = any(chunk.start for step in engine.runner.steps for chunk in step.chunks)
    assert cut == (not sharing.is_cyclic and engine.settings.prefill_tokens < 9 + 9 + 14)


def test_trained_prompts_are_neither_cut_nor_taken_from_others(single) -> None:
    case = asked(CYCLIC)
    engine = tiny_engine(TINY, CYCLIC, single, case.weights, prefill_tokens=4, page_size=2)
    answers, logits = recorded(engine, case.prompts)
    again, later = recorded(engine, case.prompts)
    assert again == answers
    assert_close(later, logits)
    assert all(chunk.start == 0 for step in engine.runner.steps for chunk in step.chunks)
    assert engine.stats().reused_tokens == 0


def test_converged_prefill_is_close_to_exact_and_cut(single) -> None:
    """In one chunk it is the plan's own forward."""
    case = asked(CYCLIC)
    prompt = case.prompts[3]
    settings = {"kv_prefill": "converged", "prefix_reuse": False}
    engine = tiny_engine(TINY, CYCLIC, single, case.weights, **settings)
    ask(engine, [prompt], greedy(1))
    plan = solver_plan(CYCLIC, CONVERGED_PREFILL.for_length(len(prompt)))
    wanted = forward_logits(engine.runner.worker.model, prompt, plan)[-1]
    assert_close([engine.runner.logits[0][0]], [wanted])
    in_chunks = tiny_engine(TINY, CYCLIC, single, case.weights, prefill_tokens=5, **settings)
    ask(in_chunks, [prompt], greedy(1))
    naive = TINY.oracle(CYCLIC, case.weights).token_by_token(torch.tensor([prompt]))[0, -1]
    # Two sweeps over five tokens after a past that is as good: between one pass and exact.
    assert_close([in_chunks.runner.logits[0][0]], [naive], 0.05)


@pytest.mark.parametrize("prefill_tokens", [64, 5])
@pytest.mark.parametrize("sharing", [CYCLIC, WINDOWED, build_map(8, "standard")], ids=str)
def test_the_tokens_of_a_prompt_are_scored(
    sharing: SharingMap, prefill_tokens: int, single
) -> None:
    """In chunks too, beside a request that is not scored and has the same beginning."""
    case = asked(sharing)
    prompt = case.prompts[3]
    naive = TINY.oracle(sharing, case.weights).token_by_token(torch.tensor([prompt]))[0]
    wanted = naive.log_softmax(-1)
    engine = tiny_engine(
        TINY,
        sharing,
        single,
        case.weights,
        kv_prefill="exact",
        prefill_tokens=prefill_tokens,
        page_size=2,
    )
    ask(engine, [prompt], greedy(2))
    scored = replace(greedy(0), prompt_logprobs=3)
    engine.submit(Request(id="scored", prompt=tuple(prompt), sampling=scored))
    (output,) = drain(engine)
    assert (output.tokens, output.finished) == ((), "length")
    first, *others = output.prompt_logprobs
    assert first is None and [each.token for each in others] == prompt[1:]
    for place, each in enumerate(others):
        assert each.logprob == pytest.approx(float(wanted[place, prompt[place + 1]]), abs=1e-4)
        top = wanted[place].topk(3)
        assert [token for token, _ in each.top] == top.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_what_else_is_in_the_batch_changes_nothing(single) -> None:
    """Tokens drawn with a seed are the same alone and among others, where no two candidates are
    closer than the rounding."""
    case = asked(CYCLIC)
    how = replace(greedy(NEW), temperature=6.0, top_p=0.95, seed=7, logprobs=2)
    alone = tiny_engine(TINY, CYCLIC, single, case.weights)
    (wanted,) = ask(alone, [case.prompts[2]], how)
    crowded = tiny_engine(TINY, CYCLIC, single, case.weights, max_batch_size=3, page_size=2)
    others = [replace(how, seed=seed) for seed in (1, 2, 3)]
    prompts = [case.prompts[0], case.prompts[1], case.prompts[2], case.prompts[2]]
    got = ask(crowded, prompts, [others[0], others[1], how, others[2]])
    assert got[2] == wanted
    assert got[3] != wanted, "another seed gives other tokens"


@pytest.mark.parametrize("sharing", [CYCLIC, WINDOWED, build_map(8, "standard")], ids=str)
def test_the_route_of_gpus_with_recorded_steps(sharing: SharingMap, single, monkeypatch) -> None:
    """The kernel that follows the table is a stand-in by its contract, and so is the recorder: what
    is tried is the table, the limits, and batches between two sizes."""
    monkeypatch.setattr(varlen, "varlen_attn", gpu_kernels.varlen_attn)
    monkeypatch.setattr(worker, "has_paged_kernel", lambda *kind: True)
    case = asked(sharing)
    plain = tiny_engine(TINY, sharing, single, case.weights, kv_prefill="exact", max_batch_size=3)
    graphs = tiny_engine(TINY, sharing, single, case.weights, kv_prefill="exact", max_batch_size=3)
    calls = []

    def record(run):
        logits = run().clone()

        def replay() -> None:
            calls.append(len(logits))
            logits.copy_(run())

        return logits, replay

    graphs.runner.worker.record_graphs(3, 64, record)
    answers, logits = recorded(graphs, case.prompts)
    assert set(calls) == {1, 2, 3} or set(calls) == {2, 3}
    assert_close(logits, naive_logits(sharing, case, answers))
    again, logits = recorded(plain, case.prompts)
    assert again == answers
    assert_close(logits, naive_logits(sharing, case, answers))
