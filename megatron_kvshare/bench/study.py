"""The paper's method, for every map and every pair of lengths: the largest batch that the memory
holds, the best batch up to it, and all maps at one batch."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_kvshare.bench.bound import Rates, decode_work, prefill_work
from megatron_kvshare.bench.capacity import Lengths, batch_bytes, largest, largest_batch
from megatron_kvshare.bench.random_weights import RandomWeights
from megatron_kvshare.bench.timing import Bed, Timing, runs, time_batch
from megatron_kvshare.checkpoint.tensors import TensorSource
from megatron_kvshare.costs.weights import parameters
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.kernels.choice import on_gpu
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.serving.layout import CacheLayout
from megatron_kvshare.serving.load import serving_model
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.spec.model_spec import ModelSpec

CPU_CACHE_GB = 0.1
"""Where nobody says how large the cache may be."""
_CLOSE_ENOUGH = 0.02
"""How near the largest batch a search by allocation comes."""

Say = Callable[[str], object]


class Candidate(NamedTuple):
    """A model of the study; ``family``: what figures join by a line. ``weights``: None: random."""

    name: str
    family: str
    spec: ModelSpec
    weights: TensorSource | None = None


class Row(NamedTuple):
    """What was measured of a map at its best batch; the fields of JSON.

    ``max_batch``: the largest that fits. ``decode_seconds_per_token``: of a step, which gives every
    sequence a token; ``same_batch*``: at the batch that all maps of these lengths share.
    ``bound_*``: the least by the measured rates, None where it is not known beforehand;
    ``*_of_bound``: the share of it that was reached.
    """

    map: str
    family: str
    kv_map: list[int]
    windowed_layers: list[int]
    kv_layers: int
    num_layers: int
    parameters: int
    prompt: int
    generated: int
    batch: int
    max_batch: int
    cache_bytes: int
    cache_tokens: int
    kv_bytes_per_token: int
    tokens_per_second: float
    over_standard: float | None
    seconds: float
    prefill_seconds: float
    ttft_seconds: float
    decode_seconds_per_token: float
    timed_steps: int
    bound_prefill_seconds: float | None
    bound_decode_seconds_per_token: float
    decode_of_bound: float
    prefill_of_bound: float | None
    same_batch: int | None
    same_batch_seconds: float | None
    same_batch_prefill_seconds: float | None
    same_batch_decode_seconds_per_token: float | None


class Clock:
    """``seconds`` for everything; a part of the work gets its share of what is left."""

    def __init__(self, seconds: float, started: float | None = None) -> None:
        self.end = (time.monotonic() if started is None else started) + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def expired(self) -> bool:
        return self.left <= 0

    def share(self, parts: int) -> Clock:
        """For the first of ``parts`` that are left."""
        return Clock(max(0.0, self.left) / parts)


@dataclass(frozen=True)
class Study:
    """``candidates``: the standard map first. ``settings.cache_gb``: of every map; None: on a GPU
    all that is free, elsewhere ``CPU_CACHE_GB``. ``steps``: how many of a generation are timed."""

    candidates: Sequence[Candidate]
    lengths: Sequence[Lengths]
    settings: EngineSettings
    steps: int
    rates: Rates
    state: ParallelState

    def rows(self, clock: Clock, say: Say) -> Iterator[Row]:
        """One after the other, each as soon as it is known; those that the time is too short for,
        or that have no standard map to stand beside, are left out."""
        standard: dict[Lengths, Row] = {}
        for number, candidate in enumerate(self.candidates):
            own = clock.share(len(self.candidates) - number)
            if number and own.expired():
                return
            bed = self._bed(candidate)
            for place, lengths in enumerate(self.lengths):
                part = own.share(len(self.lengths) - place)
                if number and lengths not in standard:
                    continue
                if (number or place) and part.expired():
                    break
                row = self._row(candidate, bed, lengths, standard.get(lengths), part, say)
                if not number:
                    standard[lengths] = row
                yield row
            del bed
            _let_go(self.state)

    def _bed(self, candidate: Candidate) -> Bed:
        spec, bf16 = candidate.spec, self.settings.bf16
        dtype = torch.bfloat16 if bf16 else torch.float32
        weights = candidate.weights or RandomWeights(spec, self.state.platform.device, dtype)
        model = serving_model(spec, weights, bf16, self.state)
        return Bed(model, self.state, self.settings, self.steps)

    def _row(
        self,
        candidate: Candidate,
        bed: Bed,
        lengths: Lengths,
        standard: Row | None,
        clock: Clock,
        say: Say,
    ) -> Row:
        most = self._largest(bed, lengths)
        known: dict[int, Timing] = {}

        def timed(batch: int) -> Timing:
            if batch not in known:
                known[batch] = time_batch(bed, batch, lengths, clock.expired)
                _let_go(self.state)
                speed = known[batch].tokens_per_second(lengths)
                say(f"{candidate.name} {lengths}: batch {batch}, {speed:,.0f} tokens/s")
            return known[batch]

        def speed(batch: int) -> float:
            return timed(batch).tokens_per_second(lengths)

        try_halves(most, speed, clock)
        shared = most if standard is None else standard.max_batch
        fits = shared <= most and (shared in known or not clock.expired())
        same = timed(shared) if fits else None
        best = known[max(known, key=speed)]
        return self._as_row(candidate, lengths, best, most, same, standard)

    def _largest(self, bed: Bed, lengths: Lengths) -> int:
        """By what the layout says; on a GPU as far as allocation confirms it."""
        device = self.state.platform.device
        budget = self._budget(device)
        most = largest_batch(bed.layout, budget, lengths)
        if most and on_gpu(device):

            def fits(batch: int) -> bool:
                fit = runs(bed, batch, lengths)
                _let_go(self.state)
                return fit

            most = largest(fits, most, _CLOSE_ENOUGH)
        if not most:
            raise ConfigError(_too_small(bed.layout, budget, lengths))
        return most

    def _budget(self, device: torch.device) -> int:
        """Bytes that the cache may take."""
        if self.settings.cache_gb is None and on_gpu(device):
            return torch.cuda.mem_get_info(device)[0]
        return int(1e9 * (self.settings.cache_gb or CPU_CACHE_GB))

    def faults(self) -> Iterator[Fault]:
        """Maps of which not one sequence fits; of a whole GPU that is found out while running."""
        device = self.state.platform.device
        if self.settings.cache_gb is None and on_gpu(device):
            return
        for candidate, lengths in itertools.product(self.candidates, self.lengths):
            element_bytes = 2 if self.settings.bf16 else 4
            layout = CacheLayout.of(candidate.spec, self.settings.page_size, element_bytes)
            if not largest_batch(layout, self._budget(device), lengths):
                yield _too_small(layout, self._budget(device), lengths, candidate.name)

    def _as_row(
        self,
        candidate: Candidate,
        lengths: Lengths,
        timing: Timing,
        most: int,
        same: Timing | None,
        standard: Row | None,
    ) -> Row:
        spec, settings, batch = candidate.spec, self.settings, timing.batch
        element_bytes = 2 if settings.bf16 else 4
        decode = decode_work(spec, lengths, batch, element_bytes).seconds(self.rates)
        prompts = prefill_work(spec, settings.kv_prefill, lengths, batch, element_bytes)
        prefill = None if prompts is None else prompts.seconds(self.rates)
        speed = timing.tokens_per_second(lengths)
        return Row(
            map=candidate.name,
            family=candidate.family,
            kv_map=list(spec.map.sources),
            windowed_layers=[n for n, marked in enumerate(spec.map.windowed) if marked],
            kv_layers=len(spec.map.producers),
            num_layers=spec.map.num_layers,
            parameters=parameters(spec.shape, spec.map),
            prompt=lengths.prompt,
            generated=lengths.generated,
            batch=batch,
            max_batch=most,
            cache_bytes=timing.cache_bytes,
            cache_tokens=timing.cache_tokens,
            kv_bytes_per_token=CacheLayout.of(spec, settings.page_size, element_bytes).token_bytes,
            tokens_per_second=speed,
            over_standard=None if standard is None else speed / standard.tokens_per_second,
            seconds=timing.seconds(lengths),
            prefill_seconds=timing.prefill_seconds,
            ttft_seconds=timing.ttft_seconds,
            decode_seconds_per_token=timing.step_seconds,
            timed_steps=timing.steps,
            bound_prefill_seconds=prefill,
            bound_decode_seconds_per_token=decode,
            prefill_of_bound=None if prefill is None else prefill / timing.prefill_seconds,
            decode_of_bound=decode / timing.step_seconds,
            same_batch=None if same is None else same.batch,
            same_batch_seconds=None if same is None else same.seconds(lengths),
            same_batch_prefill_seconds=None if same is None else same.prefill_seconds,
            same_batch_decode_seconds_per_token=None if same is None else same.step_seconds,
        )


def try_halves(most: int, speed: Callable[[int], float], clock: Clock) -> None:
    """Ask for the ``speed`` of ``most``, its half, and so on down while that is faster; what there
    is no time for is not tried."""
    batch, before = most, clock.left
    fastest = speed(most)
    while batch > 1 and 2 * clock.left > before:  # a half takes no longer than what came before it
        batch //= 2
        before = clock.left
        if (found := speed(batch)) <= fastest:
            return
        fastest = found


def _too_small(
    layout: CacheLayout, budget: int, lengths: Lengths, name: str | None = None
) -> Fault:
    needed = batch_bytes(layout, 1, lengths) / 1e9
    who = "" if name is None else f" of {name}"
    rule = f"one sequence of {lengths}{who} takes {needed:.3g} GB"
    return Fault("--cache-gb", budget / 1e9, rule, "give more, or use shorter --lengths")


def _let_go(state: ParallelState) -> None:
    """Give back what is not held any more."""
    gc.collect()
    if on_gpu(state.platform.device):
        torch.cuda.empty_cache()
