"""The engine under a load of equal requests: how long prompts take, and a step of decoding.

Both are timed through :meth:`Engine.step`, with greedy tokens. Speed depends on no value, so a long
generation need not be run whole: sequences are moved on to the places that are timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_kvshare.bench.capacity import Lengths, batch_pages
from megatron_kvshare.megatron_api.memory import shortage
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.serving.cache import PagedCache
from megatron_kvshare.serving.engine import Engine
from megatron_kvshare.serving.layout import CacheLayout
from megatron_kvshare.serving.load import new_runner
from megatron_kvshare.serving.request import Request, Sampling
from megatron_kvshare.serving.settings import EngineSettings

_PLACES = 4
"""Of a generation that is timed in part."""
_TIMES = 3
"""How often a group of prompts is timed."""

Expired = Callable[[], bool]
"""Whether there is no time for more than has to be."""


class Timing(NamedTuple):
    """Of ``batch`` sequences. ``cache_bytes``: as the tensors have them, for ``cache_tokens`` where
    no window drops any; ``prefill_seconds``: of all prompts; ``ttft_seconds``: of one prompt alone;
    ``step_seconds``: of a step that gives each sequence a token, in the mean over a generation, of
    which ``steps`` were timed."""

    batch: int
    cache_bytes: int
    cache_tokens: int
    prefill_seconds: float
    ttft_seconds: float
    step_seconds: float
    steps: int

    def seconds(self, lengths: Lengths) -> float:
        """From all prompts to the last token of each."""
        return self.prefill_seconds + (lengths.generated - 1) * self.step_seconds

    def tokens_per_second(self, lengths: Lengths) -> float:
        """New tokens over the time of prompts and new tokens."""
        return self.batch * lengths.generated / self.seconds(lengths)


class Bed(NamedTuple):
    """A model that is timed, and how its engine is set up; ``steps``: how many of a generation are
    timed."""

    model: KVShareGPT
    state: ParallelState
    settings: EngineSettings
    steps: int

    @property
    def layout(self) -> CacheLayout:
        size = self.model.config.params_dtype.itemsize
        return CacheLayout.of(self.model.spec, self.settings.page_size, size)

    def together(self, batch: int, lengths: Lengths) -> int:
        """Prompts that a step takes on: whole ones, so that none is cut for a few tokens of it."""
        return min(batch, max(1, self.settings.prefill_tokens // lengths.prompt))

    def engine(self, batch: int, lengths: Lengths) -> Engine:
        """With a cache for exactly ``batch`` such sequences."""
        spec = self.model.spec
        prompts = lengths.prompt * self.together(batch, lengths)
        settings = replace(
            self.settings,
            max_batch_size=batch,
            max_length=lengths.total,
            prefill_tokens=min(prompts, self.settings.prefill_tokens),
            prefix_reuse=False,
        )
        cache = PagedCache(
            self.layout,
            batch_pages(self.layout, batch, lengths),
            spec.model.head_dim,
            self.model.config.params_dtype,
            self.state.platform.device,
        )
        for kv in cache.pools.values():
            for pool in kv:  # memory that nobody has written need not be there to be read
                pool.fill_(0.01)
        return Engine(spec, new_runner(self.model, cache, settings, self.state), settings)


def time_batch(bed: Bed, batch: int, lengths: Lengths, expired: Expired) -> Timing:
    """Prompts and generation of ``batch`` sequences at a time."""
    engine = bed.engine(batch, lengths)
    runner = engine.runner
    prompts = Prompts(engine, lengths)
    together = bed.together(batch, lengths)
    groups = batch / together
    of_group = prompts.seconds(together, expired)
    alone = of_group if together == 1 else prompts.seconds(1, expired)
    steps = step_times(engine, batch, lengths, bed.steps, expired)
    return Timing(
        batch=batch,
        cache_bytes=runner.cache_bytes,
        cache_tokens=max(runner.pages) * runner.layout.page_size,
        prefill_seconds=groups * of_group,
        ttft_seconds=alone,
        step_seconds=statistics.mean(map(statistics.median, steps)),
        steps=sum(map(len, steps)),
    )


def runs(bed: Bed, batch: int, lengths: Lengths) -> bool:
    """Whether the GPU has the memory for it: for the cache, a group of prompts and the last step
    of ``batch`` sequences, and once more for that step, as graphs have memory of their own."""
    eager = bed._replace(settings=replace(bed.settings, cuda_graphs=False))
    device = bed.state.platform.device
    try:
        engine = eager.engine(batch, lengths)
        Prompts(engine, lengths).run(bed.together(batch, lengths))
        begin(engine, batch, lengths)
        move_on(engine, lengths.total - 2)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        engine.step()
        needed = torch.cuda.max_memory_allocated(device) - before
        return torch.cuda.mem_get_info(device)[0] >= needed
    except (RuntimeError, MemoryError) as error:
        if shortage(error) is None:
            raise
        return False


class Prompts:
    """Runs groups of prompts through an engine that has nothing else to do."""

    def __init__(self, engine: Engine, lengths: Lengths) -> None:
        self.engine = engine
        self.lengths = lengths
        self.numbers = itertools.count()

    def seconds(self, together: int, expired: Expired) -> float:
        """To the first token of ``together`` prompts; the median after one that warms up."""
        self.run(together)
        found: list[float] = []
        while len(found) < _TIMES and not (found and expired()):
            found.append(self.run(together))
        return statistics.median(found)

    def run(self, together: int) -> float:
        """The same, once."""
        start = time.perf_counter()
        for _ in range(together):
            number = next(self.numbers)
            prompt = _tokens(number, self.lengths.prompt, self.engine.spec.vocab_size)
            self.engine.submit(Request(id=f"p{number}", prompt=prompt, sampling=_greedy(1)))
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - start


def step_times(
    engine: Engine, batch: int, lengths: Lengths, steps: int, expired: Expired
) -> list[list[float]]:
    """Seconds of steps of decoding ``batch`` sequences: of all that a generation has, as one list,
    or of ``steps`` of them at a few places, with a list for each."""
    begin(engine, batch, lengths)
    found = []
    for place in places(lengths, steps):
        move_on(engine, place.start - 1)
        engine.step()
        found.append(list(_timed(engine, len(place), expired)))
    for sequence in list(engine.scheduler.running):
        engine.cancel(sequence.request.id)
    engine.step()
    return found


def _timed(engine: Engine, steps: int, expired: Expired) -> Iterator[float]:
    for number in range(steps):
        if number and expired():
            return
        start = time.perf_counter()
        engine.step()
        yield time.perf_counter() - start


def places(lengths: Lengths, steps: int) -> list[range]:
    """Positions of the tokens that are fed back in the steps that are timed, the first one of a
    generation apart: it is read with the prompt."""
    whole = range(lengths.prompt + 1, lengths.total - 1)
    if len(whole) <= max(steps, _PLACES):
        return [whole] if whole else [range(lengths.prompt, lengths.prompt + 1)]
    each = max(1, steps // _PLACES)
    middles = ((2 * n + 1) * len(whole) // (2 * _PLACES) for n in range(_PLACES))
    starts = (whole.start + middle - each // 2 for middle in middles)
    return [range(start, start + each) for start in starts]


def begin(engine: Engine, batch: int, lengths: Lengths) -> None:
    """Let ``batch`` sequences run, each with a first token in place of its prompt."""
    for number in range(batch):
        first = _tokens(number, 1, engine.spec.vocab_size)
        request = Request(id=f"d{number}", prompt=first, sampling=_greedy(lengths.total - 1))
        engine.submit(request)
    while engine.scheduler.waiting:
        engine.step()
    assert len(engine.scheduler.running) == batch, "the cache is too small for the batch"


def move_on(engine: Engine, position: int) -> None:
    """As if every running sequence had got ``position`` tokens; their keys and values are whatever
    lies in its pages."""
    pages = engine.scheduler.pages
    for sequence in engine.scheduler.running:
        if sequence.computed < position:
            sequence.tokens += [0] * (position - sequence.computed)
            pages.trim(sequence, position)
            pages.extend(sequence, position)
            sequence.computed = position


def _tokens(number: int, length: int, vocabulary: int) -> tuple[int, ...]:
    return tuple((31 * number + 7 * place) % vocabulary for place in range(length))


def _greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
