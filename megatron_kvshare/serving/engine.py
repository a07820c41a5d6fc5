"""The engine: requests in, tokens out; every step runs all requests that there is room for."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

from megatron_kvshare.data.tokenizers import Tokenizer
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.serving.layout import CacheLayout
from megatron_kvshare.serving.request import FinishReason, Output, Request, TokenLogprob
from megatron_kvshare.serving.sampling import Draw, draw
from megatron_kvshare.serving.scheduler import Scheduler
from megatron_kvshare.serving.sequence import Sequence, SequencePages
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.serving.step import Step
from megatron_kvshare.serving.text import TextStream
from megatron_kvshare.serving.worker import StepResult
from megatron_kvshare.spec.model_spec import ModelSpec


class Runner(Protocol):
    """Carries out steps on every rank of a model. ``pages``: of each group of the cache;
    ``cache_bytes``: of one rank."""

    @property
    def layout(self) -> CacheLayout: ...

    @property
    def pages(self) -> tuple[int, ...]: ...

    @property
    def cache_bytes(self) -> int: ...

    def run(self, step: Step) -> StepResult:
        """Carry out ``step`` on every rank."""
        ...

    def close(self) -> None:
        """Let the other ranks go."""
        ...


class EngineStats(NamedTuple):
    """Requests now; pages of the cache; totals since the start. ``reused_tokens``: of prompts whose
    beginning was in the cache already."""

    running: int
    waiting: int
    preempted: int
    free_pages: int
    pages: int
    cache_bytes: int
    prompt_tokens: int
    generated_tokens: int
    reused_tokens: int


class _Open(NamedTuple):
    """A request that has not ended."""

    sequence: Sequence
    text: TextStream | None
    scored: list[TokenLogprob]


class Engine:
    """Not thread-safe: one thread owns it. ``max_length``: tokens of a prompt and what follows."""

    def __init__(
        self,
        spec: ModelSpec,
        runner: Runner,
        settings: EngineSettings,
        tokenizer: Tokenizer | None = None,
        eos: Items[int] = (),
    ) -> None:
        self.spec = spec
        self.runner = runner
        self.settings = settings
        self.tokenizer = tokenizer
        self.eos = frozenset(eos)
        layout = runner.layout
        pages = SequencePages(layout.groups, runner.pages, layout.page_size)
        self.scheduler = Scheduler(
            spec.map,
            pages,
            settings.kv_prefill,
            settings.max_batch_size,
            settings.prefill_tokens,
            settings.prefix_reuse,
        )
        self.max_length = min(settings.max_length or spec.model.max_positions, _most_tokens(pages))
        self._open: dict[str, _Open] = {}
        self._by_number: dict[int, str] = {}
        self._cancelled: list[str] = []
        self._number = 0
        self._prompt_tokens = self._generated_tokens = 0

    def submit(self, request: Request) -> None:
        """Take on a request; it waits where there is no room.

        Raises:
            ConfigError: it can never be served: everything that is wrong with it.
        """
        faults = self._faults(request)
        if faults:
            raise ConfigError(faults)
        sampling, prompt = request.sampling, request.prompt
        room = self.max_length - len(prompt)
        wanted = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        sequence = Sequence(self._number, request, seed, len(prompt) + wanted)
        text = TextStream(self.tokenizer, prompt, sampling.stop) if self.tokenizer else None
        self._open[request.id] = _Open(sequence, text, [])
        self._by_number[self._number] = request.id
        self._number += 1
        self._prompt_tokens += len(prompt)
        self.scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Its last output comes with the next step; an id that is not open is ignored."""
        if request_id in self._open and request_id not in self._cancelled:
            self._cancelled.append(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def step(self) -> list[Output]:
        """Give every running request one more token, and begin those there is room for."""
        outputs = [self._end(request_id) for request_id in self._cancelled]
        self._cancelled = []
        if not self._open:
            return outputs
        step = self.scheduler.plan()
        result = self.runner.run(step)
        self.scheduler.advance(step)
        for number, scores in result.scored.items():
            self._open[self._by_number[number]].scored.extend(scores)
        return outputs + self._outputs(result)

    def stats(self) -> EngineStats:
        pools = self.scheduler.pages.pools
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            preempted=self.scheduler.preemptions,
            free_pages=sum(pool.available for pool in pools),
            pages=sum(pool.pages for pool in pools),
            cache_bytes=self.runner.cache_bytes,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            reused_tokens=self.scheduler.reused_tokens,
        )

    def close(self) -> None:
        """Let the other ranks go."""
        self.runner.close()

    def _outputs(self, result: StepResult) -> list[Output]:
        outputs: list[Output] = []
        wanting: list[_Open] = []
        rows: list[int] = []
        for row, number in enumerate(result.sequences):
            each = self._open[self._by_number[number]]
            if each.sequence.is_full:
                outputs.append(self._without_tokens(each))
            else:
                wanting.append(each)
                rows.append(row)
        if not wanting:
            return outputs
        draws = [
            Draw(s.request.sampling, s.seed, len(s.tokens), s.tokens)
            for s in (each.sequence for each in wanting)
        ]
        drawn = draw(result.logits[rows], draws)
        for each, token, logprob in zip(wanting, *drawn, strict=True):
            outputs.append(self._output(each, token, logprob))
        return outputs

    def _output(self, each: _Open, token: int, logprob: TokenLogprob | None) -> Output:
        """A request has got ``token``."""
        sequence = each.sequence
        is_first = len(sequence.tokens) == sequence.prompt_length
        sequence.tokens.append(token)
        self._generated_tokens += 1
        sampling = sequence.request.sampling
        ends = token in sampling.stop_token_ids
        ends = ends or (token in self.eos and not sampling.ignore_eos)
        finished = FinishReason.STOP if ends else None
        text = ""
        if each.text is not None and ends:
            text = each.text.finish()
        elif each.text is not None:
            text, stopped = each.text.add(token, is_last=sequence.is_full)
            finished = FinishReason.STOP if stopped else None
        if finished is None and sequence.is_full:
            finished = FinishReason.LENGTH
        if finished is not None:
            self._remove(sequence)
        logprobs = None if logprob is None else (logprob,)
        scores = self._prompt_scores(each) if is_first else None
        return Output(sequence.request.id, (token,), text, logprobs, scores, finished)

    def _without_tokens(self, each: _Open) -> Output:
        """A request that asks for no token: its prompt has been run."""
        self._remove(each.sequence)
        request = each.sequence.request
        scores = self._prompt_scores(each)
        return Output(request.id, (), "", None, scores, FinishReason.LENGTH)

    def _prompt_scores(self, each: _Open) -> tuple[TokenLogprob | None, ...] | None:
        if each.sequence.request.sampling.prompt_logprobs is None:
            return None
        return (None, *each.scored)

    def _end(self, request_id: str) -> Output:
        each = self._open[request_id]
        self._remove(each.sequence)
        text = "" if each.text is None else each.text.finish()
        return Output(request_id, (), text, finished=FinishReason.CANCELLED)

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self._open[sequence.request.id], self._by_number[sequence.number]

    def _faults(self, request: Request) -> list[Fault]:
        faults = []
        vocabulary = self.spec.vocab_size
        length, sampling = len(request.prompt), request.sampling
        if request.id in self._open:
            rule = "another request has this id and has not ended"
            faults.append(Fault("id", request.id, rule, "give every request its own"))
        if not length:
            rule = "a prompt has at least one token"
            faults.append(Fault("prompt", "", rule, "begin with the end-of-document token"))
        wrong = [x for x in request.prompt if not 0 <= x < vocabulary]
        if wrong:
            rule = f"token ids of this model are 0 to {vocabulary - 1}"
            faults.append(Fault("prompt", wrong[0], rule, "use the model's own tokenizer"))
        needed = length + (1 if sampling.max_tokens != 0 else 0)
        if needed > self.max_length:
            rule = f"prompt and new tokens are at most {self.max_length} together"
            faults.append(Fault("prompt", f"{length} tokens", rule, "shorten the prompt"))
        if sampling.stop and self.tokenizer is None:
            rule = "without a tokenizer there is no text to look for stop strings in"
            faults.append(Fault("stop", sampling.stop, rule, "use stop_token_ids"))
        return faults


def _most_tokens(pages: SequencePages) -> int:
    """Of a sequence that has the cache for itself."""
    unlimited = 1 << 40
    return min(
        unlimited
        if pool.pages >= group.peak_pages(unlimited, pages.size)
        else pool.pages * pages.size
        for group, pool in zip(pages.groups, pages.pools, strict=True)
    )
