"""What generation costs on this CPU: our engine beside transformers', and shared maps beside the
standard one and beside what bytes and FLOPs allow.

    python benchmarks/serving.py [--sections transformers fixed equal prefill] [--rounds 7]
        [--threads 2] [--json FILE]

Everything is measured in pairs, one directly after the other, and a figure is the median of the
pairs: on a shared machine only neighbours are comparable. fp32; two shapes: small is 12 layers of
256, 110m that of examples/configs/110m.yaml.

transformers: a step of decoding of transformers' Llama (`generate`, sdpa, DynamicCache) over ours,
and the share of the measured memory bandwidth at which ours reads weights and cache.
fixed: tokens per second of decoding with a cache of a fixed size, a map over the standard one, over
the same ratio of the bounds. equal: the same batch for both, without bounds.
prefill: the time of a prompt over the standard map's, over the same ratio of their FLOPs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_kvshare.bench.bound import Rates, decode_work, prefill_work
from megatron_kvshare.bench.capacity import Lengths, largest_batch
from megatron_kvshare.bench.random_weights import RandomWeights
from megatron_kvshare.bench.rates import measure_rates, read_rate
from megatron_kvshare.bench.shapes import SHAPES
from megatron_kvshare.bench.timing import Bed, Prompts, begin, move_on
from megatron_kvshare.config import ModelConfig
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.serving.load import serving_model
from megatron_kvshare.serving.settings import EngineSettings
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.spec.model_spec import ModelSpec

CPU = torch.device("cpu")
FP32 = 4
CACHE_BYTES = 205_000_000
CONTEXTS = (512, 4096)
PROMPTS = (512, 2048)
STEPS = 6
"""Of decoding in a row; their median is one time."""
SHARED = (("pizza-bottom", 6), ("pizza-bottom", 3), ("sandwich-top", 6), ("sandwich-top", 3))
ACYCLIC = (("pizza-bottom", 6), ("pizza-bottom", 3), ("lasagna-bottom", 6))
CYCLIC = (("sandwich-top", 6), ("sandwich-middle", 6), ("pizza-top", 3))
SETTINGS = EngineSettings(page_size=64, prefix_reuse=False, kv_prefill="converged")

Time = Callable[[], float]
"""Runs something and says how many seconds it took."""


@dataclass(frozen=True)
class Setup:
    """What all sections share."""

    state: parallel.ParallelState
    rates: Rates
    rounds: int


@dataclass(frozen=True)
class Figure:
    """``value``: the median of the pairs; ``spread``: their quartiles; ``target``: the least or the
    most that it should be."""

    section: str
    name: str
    value: float
    spread: tuple[float, float]
    target: str
    reached: bool
    details: dict[str, float]


def spec_of(shape: str, pattern: str = "standard", kv_layers: int | None = None) -> ModelSpec:
    sizes = {name: value for name, value in SHAPES[shape].items() if name != "vocab_size"}
    model = ModelConfig(seq_length=8192, **sizes)
    sharing = build_map(model.num_layers, pattern, kv_layers)
    return ModelSpec(model=model, map=sharing, vocab_size=int(SHAPES[shape]["vocab_size"]))


def bed_of(spec: ModelSpec, setup: Setup) -> Bed:
    weights = RandomWeights(spec, CPU, torch.float32)
    return Bed(serving_model(spec, weights, False, setup.state), setup.state, SETTINGS, STEPS)


def decoding(bed: Bed, batch: int, lengths: Lengths) -> Time:
    """Steps of decoding ``batch`` sequences, from the end of the prompt on."""
    engine = bed.engine(batch, lengths)
    begin(engine, batch, lengths)
    move_on(engine, lengths.prompt)
    engine.step()

    def step() -> float:
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        assert len(engine.scheduler.running) == batch, "the generation has come to its end"
        return statistics.median(times)

    return step


def pairs(rounds: int, mine: Time, reference: Time) -> list[tuple[float, float]]:
    """Times of both, one directly after the other; what warms up is dropped."""
    return [(mine(), reference()) for _ in range(rounds + 1)][1:]


def figure(
    section: str,
    name: str,
    values: list[float],
    least: float | None = None,
    most: float | None = None,
    **details: float,
) -> Figure:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    value = statistics.median(ordered)
    target = "" if least is most is None else f">= {least}" if most is None else f"<= {most}"
    reached = (least is None or value >= least) and (most is None or value <= most)
    spread = (ordered[quarter], ordered[-1 - quarter])
    return Figure(section, name, value, spread, target, reached, details)


def generated_by_transformers(spec: ModelSpec, batch: int, lengths: Lengths) -> Time:
    """The median step of one call of `generate`, which runs the prompt first."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model = spec.model
    net = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.query_groups,
            vocab_size=spec.vocab_size,
            max_position_embeddings=model.max_positions,
            attn_implementation="sdpa",
            tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        )
    ).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(spec.vocab_size, (batch, lengths.prompt), generator=draw)

    class Watch(BaseStreamer):
        """Is told of every step. A streamer takes one sequence only: this one takes what comes."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def run() -> float:
        watch = Watch()
        with torch.inference_mode():
            net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=lengths.generated,
                min_new_tokens=lengths.generated,
                do_sample=False,
                pad_token_id=0,
                streamer=watch,
            )
        _, *steps = watch.times  # the first is told with the prompt itself
        assert len(steps) == lengths.generated
        return statistics.median(b - a for a, b in itertools.pairwise(steps))

    return run


def beside_transformers(setup: Setup) -> Iterator[Figure]:
    lengths = Lengths(128, 64)
    spec, batch = spec_of("small"), 16
    length = STEPS * (setup.rounds + 1) + 8
    ours = decoding(bed_of(spec, setup), batch, Lengths(128, length))
    theirs = generated_by_transformers(spec, batch, lengths)
    times = pairs(setup.rounds, ours, theirs)
    yield figure(
        "transformers",
        "small, batch 16, context 128: transformers' step over ours",
        [their / mine for mine, their in times],
        least=1.5,
        tokens_per_second=batch / statistics.median(mine for mine, _ in times),
        transformers_tokens_per_second=batch / statistics.median(their for _, their in times),
    )
    spec = spec_of("110m")
    bed = bed_of(spec, setup)
    ours = decoding(bed, 1, Lengths(128, length))
    work = decode_work(spec, Lengths(128, length), 1, FP32)
    read = work.weight_bytes + work.kv_bytes
    times = pairs(setup.rounds, ours, lambda: 1 / read_rate(CPU, repeats=2))
    yield figure(
        "transformers",
        "110m, batch 1, context 128: share of the memory bandwidth",
        [read / mine * per_byte for mine, per_byte in times],
        least=0.8,
        tokens_per_second=1 / statistics.median(mine for mine, _ in times),
        bytes_per_second=1 / statistics.median(per_byte for _, per_byte in times),
        bytes_of_a_step=read,
    )
    theirs = generated_by_transformers(spec, 1, Lengths(128, 24))
    ours = decoding(bed, 1, Lengths(128, length))
    times = pairs(min(3, setup.rounds), ours, theirs)
    yield figure(
        "transformers",
        "110m, batch 1, context 128: transformers' step over ours",
        [their / mine for mine, their in times],
        transformers_tokens_per_second=1 / statistics.median(their for _, their in times),
    )


def decoded(setup: Setup, section: str) -> Iterator[Figure]:
    """A map's step beside the standard map's, with a cache of one size or at one batch."""
    standard = spec_of("small")
    base = bed_of(standard, setup)
    for context in CONTEXTS:
        lengths = Lengths(context, STEPS * (setup.rounds + 1) + 8)
        batch = largest_batch(base.layout, CACHE_BYTES, lengths)
        for pattern, kv_layers in SHARED:
            spec = spec_of("small", pattern, kv_layers)
            bed = bed_of(spec, setup)
            mine = largest_batch(bed.layout, CACHE_BYTES, lengths) if section == "fixed" else batch
            times = pairs(
                setup.rounds, decoding(bed, mine, lengths), decoding(base, batch, lengths)
            )
            gains = [mine / batch * theirs / ours for ours, theirs in times]
            bounds = [
                n / decode_work(each, lengths, n, FP32).seconds(setup.rates)
                for each, n in ((spec, mine), (standard, batch))
            ]
            bound = bounds[0] / bounds[1] if section == "fixed" else 1.0
            yield figure(
                section,
                f"{pattern} {kv_layers}, context {context}, batch {mine} beside {batch}",
                [gain / bound for gain in gains],
                least=0.9 if section == "fixed" else 0.97,
                gain=statistics.median(gains),
                bound=bounds[0] / bounds[1],
                step_of_bound=mine / bounds[0] / statistics.median(ours for ours, _ in times),
                standard_step_of_bound=batch / bounds[1] / statistics.median(x for _, x in times),
            )


def prefilled(setup: Setup) -> Iterator[Figure]:
    base = bed_of(spec_of("small"), setup)
    for tokens in PROMPTS:
        lengths = Lengths(tokens, 4)
        standard = Prompts(base.engine(1, lengths), lengths)
        for pattern, kv_layers in (*ACYCLIC, *CYCLIC):
            spec = spec_of("small", pattern, kv_layers)
            prompts = Prompts(bed_of(spec, setup).engine(1, lengths), lengths)
            times = pairs(setup.rounds, partial(prompts.run, 1), partial(standard.run, 1))
            works = [
                prefill_work(each, SETTINGS.kv_prefill, lengths, 1, FP32)
                for each in (spec, base.model.spec)
            ]
            mine, theirs = (work.linear_flops for work in works if work is not None)
            yield figure(
                "prefill",
                f"{pattern} {kv_layers}, {tokens} tokens: time over work, beside standard",
                [ours / other * theirs / mine for ours, other in times],
                most=1.25 if spec.map.is_cyclic and tokens < 2048 else 1.1,
                time=statistics.median(ours / other for ours, other in times),
                work=mine / theirs,
                seconds=statistics.median(ours for ours, _ in times),
            )


SECTIONS: dict[str, Callable[[Setup], Iterator[Figure]]] = {
    "transformers": beside_transformers,
    "fixed": partial(decoded, section="fixed"),
    "equal": partial(decoded, section="equal"),
    "prefill": prefilled,
}


def table(figures: list[Figure]) -> Table:
    drawn = Table("figure", "median", "quartiles", "target", "ok", title="generation on this CPU")
    for each in figures:
        spread = "{:.2f}-{:.2f}".format(*each.spread)
        ok = "" if not each.target else "yes" if each.reached else "NO"
        name = f"{each.section}: {each.name}"
        drawn.add_row(name, f"{each.value:.3f}", spread, each.target, ok)
    return drawn


def written(figures: list[Figure], rates: Rates, seconds: float) -> dict[str, Any]:
    return {
        "figures": [asdict(each) for each in figures],
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **rates._asdict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(highlight=False)
    start = time.monotonic()
    figures: list[Figure] = []
    with parallel.alone() as state:
        rates = measure_rates(CPU, torch.float32)
        setup = Setup(state, rates, arguments.rounds)
        for section in arguments.sections:
            for each in SECTIONS[section](setup):
                figures.append(each)
                elapsed = time.monotonic() - start
                line = f"{elapsed:4.0f} s  {each.section}: {each.name}: {each.value:.3f}"
                print(line, file=sys.stderr, flush=True)
                if arguments.json is not None:  # what has been measured outlives an interruption
                    content = written(figures, rates, elapsed)
                    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    console.print(table(figures))
    console.print(
        f"{rates.bytes_per_second / 1e9:.1f} GB/s read, {rates.flops_per_second / 1e9:.0f} GFLOP/s,"
        f" {torch.get_num_threads()} threads, {time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
