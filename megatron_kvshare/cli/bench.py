"""``kvshare bench``: how many sequences fit and how fast they are, of maps beside the standard."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_kvshare.cli.bench_flags import RULES, BenchConfig, maps, with_sizes
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.config.flags.megatron_flags import MEGATRON_FLAGS
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.output import complain
from megatron_kvshare.ownership.owner import file_place, owned
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from megatron_kvshare.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from megatron_kvshare.bench.study import Candidate, Row, Study

_ASSUMED_VOCABULARY = 32000  # Llama's
_EXAMPLES = """\
  kvshare bench
  kvshare bench --json > bench.json
  kvshare bench --shape 110m --kv-pattern sandwich-middle yoco:2 --kv-layers 6 --cache-gb 0.5
  kvshare bench --kv-map 0_1_1_3_3_5_5_7 --hidden-size 128 --num-attention-heads 4
  kvshare bench --hf runs/my/hf --lengths 512+512 --output runs/my/bench
  bash examples/bench_1b.sh

Prompts and weights are random (but for --load and --hf, whose own weights are used), tokens greedy;
neither changes the speed. What is measured and how: docs/serving.md."""


def run(argv: Sequence[str]) -> int:
    """Measure, and print what was found."""
    started = time.monotonic()
    command = Command(
        prog="kvshare bench",
        description="Measure how many sequences the memory holds, and how fast they are.\n"
        "Sizes that are left out are those of --shape, not the defaults below.",
        examples=_EXAMPLES,
        rules=RULES,
        megatron=MEGATRON_FLAGS,
    )
    config = parse(BenchConfig, with_sizes(argv), command)
    from megatron_kvshare.megatron_api import parallel

    with parallel.alone("auto") as state:
        study = _study(config, state)
        rows = list(_measured(study, config, started))
    found = _as_data(config, study, rows)
    if config.output is not None:
        _write(Path(config.output), found, rows)
    if config.json:
        print(json.dumps(found))
    else:
        _show(study, rows)
    return 0


def _study(config: BenchConfig, state: Any) -> Study:
    from megatron_kvshare.bench.rates import measure_rates
    from megatron_kvshare.bench.study import Study

    candidates = _candidates(config)
    device, settings = state.platform.device, config.engine_settings()
    complain(f"measuring {_device_name(device)}")
    rates = measure_rates(device, _dtype(settings.bf16))
    study = Study(candidates, config.pairs, settings, config.decode_steps, rates, state)
    faults = list(study.faults())
    if faults:
        raise ConfigError(faults)
    return study


def _candidates(config: BenchConfig) -> list[Candidate]:
    """The standard map, the loaded model if there is one, and the maps that are asked for."""
    from megatron_kvshare.bench.study import Candidate

    loaded: list[Candidate] = []
    vocabulary = config.model.vocab_size or _ASSUMED_VOCABULARY
    base = ModelSpec(
        model=config.model,
        map=build_map(config.model.num_layers),
        recipe=RECIPES[config.kv_recipe],
        window_size=config.window_size,
        vocab_size=vocabulary,
    )
    path = config.load or config.hf
    if path is not None:
        from megatron_kvshare.serving.load import open_model

        opened = open_model(path)
        name = Path(path).resolve().name
        loaded.append(Candidate(name, name, opened.spec, opened.weights))
        layers = opened.spec.map.num_layers
        base = replace(opened.spec, map=build_map(layers), recipe=RECIPES[config.kv_recipe])
    found = [Candidate("standard", "standard", base), *loaded]
    for name, family, sharing in maps(config, base.map.num_layers):
        found.append(Candidate(name, family, replace(base, map=sharing)))
    return found


def _measured(study: Study, config: BenchConfig, started: float) -> Iterator[Row]:
    from megatron_kvshare.bench.study import Clock

    clock = Clock(config.budget, started)
    done = set()
    for row in study.rows(clock, complain):
        done.add((row.map, row.prompt, row.generated))
        yield row
    left = [text for text, key in _planned(study) if key not in done]
    if left:
        complain(f"left out for want of time (--budget {config.budget:g}): {', '.join(left)}")


def _planned(study: Study) -> Iterator[tuple[str, tuple[str, int, int]]]:
    for candidate, lengths in itertools.product(study.candidates, study.lengths):
        yield f"{candidate.name} {lengths}", (candidate.name, *lengths)


def _as_data(config: BenchConfig, study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    import torch

    device, base = study.state.platform.device, study.candidates[0].spec
    done = {(row.map, row.prompt, row.generated) for row in rows}
    return {
        "rows": [row._asdict() for row in rows],
        "left_out": [text for text, key in _planned(study) if key not in done],
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(_dtype(study.settings.bf16)).removeprefix("torch."),
        "hidden_size": base.shape.hidden_size,
        "vocab_size": base.shape.vocab_size,
        "page_size": study.settings.page_size,
        "kv_prefill": study.settings.kv_prefill,
        "kv_recipe": config.kv_recipe,
        "bytes_per_second": study.rates.bytes_per_second,
        "flops_per_second": study.rates.flops_per_second,
    }


def _dtype(bf16: bool) -> Any:
    import torch

    return torch.bfloat16 if bf16 else torch.float32


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"


def _show(study: Study, rows: Sequence[Row]) -> None:
    from rich.console import Console

    from megatron_kvshare.bench.table import LEGEND, rates_text, table

    console = Console(highlight=False)
    console.print(table(rows))
    console.print(LEGEND)
    console.print(rates_text(study.rates))


def _write(folder: Path, found: dict[str, Any], rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from megatron_kvshare.bench.figures import draw

    try:
        with owned(file_place("--output", str(folder / "bench"))):
            (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
            drawn = draw(rows, folder)
    except OSError as error:
        fix = "give a folder that can be written"
        rule_text = f"cannot be written ({error})"
        raise ConfigError(Fault("--output", str(folder), rule_text, fix)) from error
    names = ", ".join(path.name for path in drawn)
    print(f"wrote bench.json, {names} into {folder}", file=sys.stderr)
