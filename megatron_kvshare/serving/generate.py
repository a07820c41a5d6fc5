"""Texts for a list of prompts: the engine, run to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.request import FinishReason, Output, Request, Sampling, TokenLogprob


@dataclass
class Generated:
    """What followed a prompt. ``text`` is empty without a tokenizer."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def add(self, output: Output) -> None:
        self.tokens += output.tokens
        self.text += output.text
        self.logprobs += output.logprobs or ()
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.finished = output.finished


def encoded(engine: Engine, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """Token ids of a prompt; an empty text becomes the token that ends documents.

    Raises:
        ConfigError: a text, and no tokenizer.
    """
    if not isinstance(prompt, str):
        return tuple(prompt)
    if engine.tokenizer is None:
        rule = "the model has no tokenizer"
        raise ConfigError(Fault("prompt", prompt, rule, "give token ids, or --tokenizer-model"))
    ids = tuple(engine.tokenizer.encode(prompt))
    eod = engine.tokenizer.eod
    return ids if ids or eod is None else (eod,)


def generate(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    show: Callable[[int, Output], None] | None = None,
) -> list[Generated]:
    """The texts that follow ``prompts``, in their order; ``show``: told of every output, with the
    number of its prompt. With a seed, prompt ``i`` has ``seed + i``.

    Raises:
        ConfigError: a prompt that can never be served: with everything that is wrong.
    """
    results = [Generated() for _ in prompts]
    for number, request in enumerate(_requests(engine, prompts, sampling)):
        try:
            engine.submit(request)
        except ConfigError:
            for earlier in range(number):
                engine.cancel(str(earlier))
            engine.step()
            raise
    while engine.has_work:
        for output in engine.step():
            results[int(output.id)].add(output)
            if show is not None:
                show(int(output.id), output)
    return results


def _requests(
    engine: Engine, prompts: Sequence[str | Sequence[int]], sampling: Sampling
) -> Iterator[Request]:
    for number, prompt in enumerate(prompts):
        seed = None if sampling.seed is None else sampling.seed + number
        own = replace(sampling, seed=seed)
        yield Request(id=str(number), prompt=encoded(engine, prompt), sampling=own)
