"""What a GPU makes of a training step: the maps beside the standard one and transformers' Llama.

    python benchmarks/gpu.py [--budget 180] [--full] [--profile] [--json gpu.json] [--png gpu.png]

One command, no data, one process. A row is a model of about 1.1B weights in bf16: steps of 8
microbatches of 4 x 2048 tokens, forward, backward, gradient norm, clipping and AdamW, after two
that warm up; the median. Rows run in the order of what they tell; those for which the budget of
seconds has no time left are named. On a machine without a GPU the same code runs with a toy model
in fp32, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_trace import KINDS, Trace, traced
from rich.console import Console
from rich.table import Table

from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.costs.cost import train_flops_per_token
from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.engines import build_engine
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.megatron_api.memory import shortage
from megatron_kvshare.model.gpt import build_stages
from megatron_kvshare.pipeline.runner import Pass
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.compiled_kernels import with_sound_kernels
from megatron_kvshare.train.peaks import datasheet_tflops, measured_tflops

GIB = 2**30
WARM_UP = 2


class Size(NamedTuple):
    """A model and its step; ``kv_layers``: how many layers keep KV in the two sizes of a map."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    length: int
    sequences: int
    microbatches: int
    kv_layers: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.length * self.sequences * self.microbatches


REAL = Size(22, 2048, 5632, 32, 4, 32_000, 2048, 4, 8, (11, 3))
TOY = Size(6, 64, 176, 4, 2, 512, 64, 2, 2, (3, 2))


class Case(NamedTuple):
    """A row to measure: a map of ours and its recipe, or transformers' Llama; ``target``: the most
    that its time may be of the standard map's on an H100."""

    name: str
    pattern: str = ""
    kv_layers: int = 0
    recipe: str = ""
    target: float | None = None

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, str(self.kv_layers or ""), self.recipe)))


def cases(size: Size, full: bool, compiles: bool) -> Iterator[Case]:
    """In the order of what they tell; ``compiles``: torch.compile has its turn."""
    many, few = size.kv_layers
    yield Case("standard", "standard")
    if compiles:
        yield Case("transformers, compiled")
    yield Case("sandwich-top", "sandwich-top", many, "one-sweep", 1.20)
    yield Case("pizza-bottom", "pizza-bottom", many, "", 1.0)
    yield Case("sandwich-top", "sandwich-top", few, "one-sweep", 1.28)
    yield Case("sandwich-middle", "sandwich-middle", many, "two-sweep", 1.25)
    yield Case("sandwich-top", "sandwich-top", many, "two-sweep", 1.40)
    yield Case("sandwich-top", "sandwich-top", few, "two-sweep", 1.55)
    yield Case("sandwich-middle", "sandwich-middle", many, "one-sweep")
    yield Case("transformers, eager")
    if full:
        for pattern, kv_layers in (("sandwich-top", many), ("sandwich-top", few)):
            yield Case(pattern, pattern, kv_layers, "paper")
        for pattern in ("pizza-top", "lasagna-middle", "lasagna-top"):
            yield Case(pattern, pattern, many, "two-sweep")


@dataclass
class Row:
    """What was measured. FLOPs are those that the sweeps need; ``busy``: share of a step in which
    a kernel ran; ``kinds``: seconds of a step by kind of kernel; memory in GiB."""

    name: str
    kv_layers: int
    recipe: str
    target: float | None
    seconds: float = 0.0
    quickest: float = 0.0
    steps: int = 0
    tokens_per_second: float = 0.0
    tflops: float = 0.0
    memory: float | None = None
    estimated_memory: float | None = None
    busy: float | None = None
    kinds: dict[str, float] | None = None
    missing: str = ""


class Stepper(NamedTuple):
    """A model ready to train: one step, its FLOPs per token, and the memory it should take."""

    step: Callable[[], object]
    flops_per_token: float
    estimated_bytes: int | None


def planned_run(case: Case, size: Size, *more: str) -> RunPlan:
    """What the settings of a row come to; ``more``: further flags."""
    many = {
        "num-layers": size.layers,
        "hidden-size": size.hidden,
        "ffn-hidden-size": size.ffn,
        "num-attention-heads": size.heads,
        "num-query-groups": size.kv_heads,
        "vocab-size": size.vocabulary,
        "seq-length": size.length,
        "micro-batch-size": size.sequences,
        "global-batch-size": size.sequences * size.microbatches,
        "kv-pattern": case.pattern,
        **({"kv-layers": case.kv_layers} if case.kv_layers else {}),
        **({"kv-recipe": case.recipe} if case.recipe else {}),
    }
    words = ["--mock-data", "--untie-embeddings-and-output-weights"]
    words += [word for name, value in many.items() for word in (f"--{name}", str(value))]
    return RunPlan.of(parse_pretrain([*words, *more]), 1)


def our_model(
    case: Case, size: Size, state: parallel.ParallelState, flags: Sequence[str]
) -> Stepper:
    """Through the product's own path, but for weights drawn on the device and tokens drawn here."""
    device = state.platform.device
    kind = ["--bf16"] if device.type == "cuda" else []
    planned = planned_run(case, size, *kind, *flags)
    config = planned.config
    spec = with_sound_kernels(
        planned.spec(size.vocabulary, None), planned.plan, size.sequences, state
    )
    stages = build_stages(
        spec, config.parallel, planned.plan, planned.placement.stages_of(0), state
    )
    with torch.no_grad():
        for weight in stages[0].parameters():
            weight.normal_(0.0, 0.02) if weight.dim() > 1 else weight.fill_(1.0)
    engine = build_engine(planned, stages, state)
    tokens, labels = drawn(size, device)
    batch = Batch(tokens, labels, torch.ones(labels.shape, device=device), None, None)
    numbers = itertools.count(1)

    def step() -> float:
        engine.set_learning_rate(next(numbers))
        sums = engine.forward_backward(itertools.repeat(batch), Pass(planned.plan))
        engine.update(engine.gradient_norm())
        return sums.mean_loss

    flops = train_flops_per_token(spec.shape, planned.plan)
    return Stepper(step, flops, planned.memory(spec).total)


def transformers_model(size: Size, device: torch.device, compiled: bool) -> Stepper:
    """Llama with sdpa attention, weights in the same type, torch's fused AdamW on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        use_cache=False,
    )
    with device:
        net = LlamaForCausalLM(config)
    net = net.to(torch.bfloat16) if device.type == "cuda" else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    run = torch.compile(net) if compiled else net
    tokens, labels = drawn(size, device)

    def step() -> float:
        optimizer.zero_grad()
        for _ in range(size.microbatches):
            logits = run(tokens).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
            (loss / size.microbatches).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    plan = planned_run(Case("standard", "standard"), size)
    flops = train_flops_per_token(plan.spec(size.vocabulary, None).shape, plan.plan)
    return Stepper(step, flops, None)


def drawn(size: Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (size.sequences, size.length + 1)
    tokens = torch.randint(size.vocabulary, shape, generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def measured(row: Row, model: Stepper, size: Size, device: torch.device, steps: int) -> None:
    """Fill in a row."""
    on_gpu = device.type == "cuda"

    def timed() -> float:
        start = time.perf_counter()
        model.step()  # ends with a number on the host: nothing is left running
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        timed()
    times = [timed() for _ in range(steps)]
    row.seconds, row.quickest, row.steps = statistics.median(times), min(times), steps
    row.tokens_per_second = size.tokens / row.seconds
    row.tflops = model.flops_per_token * row.tokens_per_second / 1e12
    if model.estimated_bytes is not None:
        row.estimated_memory = model.estimated_bytes / GIB
    if on_gpu:
        row.memory = torch.cuda.max_memory_allocated(device) / GIB
        trace: Trace = traced(timed)
        row.busy, row.kinds = trace.busy / trace.seconds, trace.kinds


def run_case(
    case: Case, size: Size, state: parallel.ParallelState, steps: int, flags: Sequence[str]
) -> Row:
    """A row, or what it lacks and why."""
    device = state.platform.device
    row = Row(case.name, case.kv_layers, case.recipe, case.target)
    try:
        if case.pattern:
            model = our_model(case, size, state, flags)
        else:
            model = transformers_model(size, device, compiled="compiled" in case.name)
        measured(row, model, size, device, steps)
    except Exception as error:
        if shortage(error) is None and case.pattern:
            raise
        row.missing = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def copy_peak(device: torch.device) -> float:
    """GB/s that a copy reads and writes."""
    elements = GIB // 4 if device.type == "cuda" else GIB // 64
    source = torch.ones(elements, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * 4 * elements / best / 1e9


def table(rows: Sequence[Row], card: dict[str, Any]) -> Table:
    """Ratios are over the standard map of the same run."""
    standard = next((row.seconds for row in rows if row.name == "standard"), 0.0)
    shown = Table(title=f"{card['name']}, {card['dtype']}", title_justify="left")
    for heading in ("model", "KV layers", "recipe", "ms", "over standard", "target", "tokens/s"):
        shown.add_column(heading, justify="left" if heading in ("model", "recipe") else "right")
    for heading in ("TFLOP/s", "of datasheet", "of measured", "GiB", "estimated", "busy"):
        shown.add_column(heading, justify="right")

    def share(value: float, whole: float | None) -> str:
        return "-" if not whole else f"{value / whole:.1%}"

    def or_dash(value: float | None, how: str) -> str:
        return "-" if value is None else format(value, how)

    for row in rows:
        name = [row.name, str(row.kv_layers or "-"), row.recipe or "-"]
        if row.missing:
            shown.add_row(*name, row.missing)
            continue
        shown.add_row(
            *name,
            f"{row.seconds * 1e3:,.1f}",
            f"{row.seconds / standard:.2f}" if standard else "-",
            or_dash(row.target, ".2f"),
            f"{row.tokens_per_second:,.0f}",
            f"{row.tflops:,.4g}",
            share(row.tflops, card["datasheet_tflops"]),
            share(row.tflops, card["measured_tflops"]),
            or_dash(row.memory, ".1f"),
            or_dash(row.estimated_memory, ".1f"),
            or_dash(row.busy, ".0%"),
        )
    return shown


def kinds_table(rows: Sequence[Row]) -> Table:
    """Where the milliseconds of a step go."""
    shown = Table(title="ms of a step, by kind of kernel", title_justify="left")
    for heading in ("model", "KV layers", "recipe", *KINDS):
        shown.add_column(heading, justify="left" if heading in ("model", "recipe") else "right")
    for row in (row for row in rows if row.kinds):
        parts = (f"{1e3 * row.kinds[kind]:,.1f}" for kind in KINDS)
        shown.add_row(row.name, str(row.kv_layers or "-"), row.recipe or "-", *parts)
    return shown


def picture(rows: Sequence[Row], card: dict[str, Any], path: Path) -> None:
    """Milliseconds of each row, by kind of kernel where they were seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn_rows = [row for row in rows if not row.missing][::-1]
    names = [Case(row.name, "", row.kv_layers, row.recipe).label for row in drawn_rows]
    figure, axis = pyplot.subplots(figsize=(9, 0.45 * len(names) + 1.5), layout="constrained")
    left = [0.0] * len(names)
    for kind in KINDS if any(row.kinds for row in drawn_rows) else ("step",):
        width = [1e3 * (r.kinds or {"step": r.seconds}).get(kind, 0.0) for r in drawn_rows]
        axis.barh(names, width, left=left, label=kind)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axis.set_xlabel("ms per step")
    axis.set_title(f"{card['name']}, {card['dtype']}")
    if any(row.kinds for row in drawn_rows):
        axis.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=180.0, metavar="S", help="seconds in all")
    parser.add_argument("--full", action="store_true", help="more maps and steps; budget 900")
    parser.add_argument("--profile", action="store_true", help="print time by kind of kernel too")
    parser.add_argument("--no-compile", action="store_true", help="as in kvshare pretrain")
    parser.add_argument("--no-flex-attention", action="store_true", help="as in kvshare pretrain")
    parser.add_argument("--toy", action="store_true", help="the toy model on a GPU too")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--png", type=Path, default=Path("gpu.png"))
    words = parser.parse_args()
    plain = {"--no-compile": words.no_compile, "--no-flex-attention": words.no_flex_attention}
    flags = [flag for flag, given in plain.items() if given]
    started = time.perf_counter()
    budget = 900.0 if words.full and words.budget == 180.0 else words.budget
    state = parallel.initialize()
    device, console = state.platform.device, Console()
    on_gpu = device.type == "cuda"
    size = REAL if on_gpu and not words.toy else TOY
    dtype = torch.bfloat16 if on_gpu else torch.float32
    card: dict[str, Any] = {
        "name": torch.cuda.get_device_name(device) if on_gpu else "CPU: a toy, no figures",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "datasheet_tflops": datasheet_tflops(torch.cuda.get_device_name(device), dtype)
        if on_gpu
        else None,
        "measured_tflops": measured_tflops(device, dtype),
        "copy_gigabytes_per_second": copy_peak(device),
        "size": size._asdict(),
        "flags": flags,
    }
    console.print(
        f"{card['name']}: {card['measured_tflops']:,.4g} TFLOP/s in a product, "
        f"{card['copy_gigabytes_per_second']:,.0f} GB/s in a copy"
    )
    rows: list[Row] = []
    left_out: list[Case] = []
    longest = 0.0
    for case in cases(size, words.full, compiles=on_gpu):
        case = case if size is REAL else case._replace(target=None)
        begun = time.perf_counter()
        if rows and begun - started + longest > budget:
            left_out.append(case)
            continue
        steps = 9 if words.full else 5
        rows.append(run_case(case, size, state, steps, flags))
        spent = time.perf_counter() - begun
        longest = max(longest, spent) if case.pattern else longest  # compiling is done once
        console.print(f"  {case.label}: {spent:.0f} s")
        words.json.write_text(
            json.dumps({"card": card, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    console.width = max(console.width, 160)
    console.print(table(rows, card))
    if words.profile and any(row.kinds for row in rows):
        console.print(kinds_table(rows))
    if left_out:
        names = ", ".join(case.label for case in left_out)
        console.print(f"Left out for want of time (--budget {budget:g}): {names}")
    picture(rows, card, words.png)
    console.print(f"{words.json}, {words.png}; {time.perf_counter() - started:.0f} s")
    parallel.destroy()


if __name__ == "__main__":
    main()
