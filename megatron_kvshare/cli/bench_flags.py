"""The flags of ``kvshare bench``: maps, a model, lengths and memory."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from megatron_kvshare.bench.capacity import Lengths
from megatron_kvshare.bench.shapes import SHAPES
from megatron_kvshare.config import ModelConfig
from megatron_kvshare.config.fields.model import RecipeName
from megatron_kvshare.config.fields.types import SCHEMA, Count, Positive, Seconds, dataclass
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.config.flags.settings import flag_of, settings_of
from megatron_kvshare.config.flags.sources import read_arguments
from megatron_kvshare.config.rules.model import groups_fit, heads_fit
from megatron_kvshare.errors import ConfigError, Fault, MapError
from megatron_kvshare.serving.settings import EngineSettings, PrefillMode
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map, takes_kv_layers, window_faults
from megatron_kvshare.sharing.solver import DEFAULT_RECIPE

_STANDARD = "standard"
_USUAL_SHAPE = "small"
_USUAL_PATTERNS = ("pizza-bottom", "sandwich-top")
_LENGTHS = re.compile(r"([1-9][0-9]{0,6})\+([1-9][0-9]{0,6})")
_LEAST_GENERATED = 4


class NamedMap(NamedTuple):
    """``family``: the name without the number of KV layers."""

    name: str
    family: str
    map: SharingMap


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class BenchConfig:
    """Maps, a model, lengths and memory."""

    shape: Literal["small", "110m", "1b"] | None = None
    """Sizes of the model by name: small is 12 layers of 256, 110m and 1b those of examples/; flags
    change single ones. Left out: small."""
    load: str | None = None
    """Measure this checkpoint's model and map (a --save folder, or one of its iter_* folders)."""
    hf: str | None = None
    """The same of a Hugging Face folder."""
    kv_pattern: tuple[str, ...] = ()
    """Named maps, beside the standard one; left out, with no --kv-map: pizza-bottom and
    sandwich-top."""
    kv_layers: tuple[Count, ...] = ()
    """Numbers of KV layers, each tried with every named map that takes one; left out: a half and a
    quarter of the layers."""
    kv_map: tuple[str, ...] = ()
    """Explicit maps, as in 0_1_1_3."""
    window_size: Count | None = None
    """Sliding-window width in tokens for the layers marked s."""
    kv_recipe: RecipeName = DEFAULT_RECIPE
    """How --kv-prefill trained computes cyclic maps; ignored for the map of --load and --hf, which
    has its own."""
    kv_prefill: PrefillMode = "trained"
    """How keys and values of a prompt are made where layers read above themselves."""
    lengths: tuple[str, ...] = ("16+240", "256+256")
    """Tokens of prompts and tokens generated after each, as in 5+2043."""
    cache_gb: Positive | None = None
    """The memory budget of the cache, in 1e9 bytes; left out: on a GPU all that is free beside the
    weights, elsewhere 0.1."""
    page_size: Annotated[int, Field(ge=1, le=65536)] = 128
    """Tokens of a page of the cache."""
    prefill_tokens: Count = 2048
    """About so many tokens of prompts are read in a step."""
    cuda_graphs: bool = True
    """On a GPU, decoding steps are recorded once and replayed."""
    decode_steps: Count = 32
    """Steps timed of each generation, at four places spread evenly over it; where it has no more,
    all of it is run."""
    budget: Seconds = 150
    """Seconds for everything; rows that there is no time for are left out and named."""
    output: str | None = None
    """Folder for bench.json and the figures throughput.png and prefill_latency.png."""
    json: bool = False
    """Print one JSON object instead of the table; progress goes to standard error."""
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def pairs(self) -> tuple[Lengths, ...]:
        """The lengths as numbers, each pair once."""
        found = (_LENGTHS.fullmatch(text) for text in self.lengths)
        pairs = (Lengths(int(each[1]), int(each[2])) for each in found if each)
        return tuple(dict.fromkeys(pairs))

    def engine_settings(self) -> EngineSettings:
        return EngineSettings(
            page_size=self.page_size,
            cache_gb=self.cache_gb,
            prefill_tokens=self.prefill_tokens,
            kv_prefill=self.kv_prefill,
            bf16=self.model.bf16,
            cuda_graphs=self.cuda_graphs,
        )


@rule("lengths")
def _lengths_are_pairs(config: BenchConfig) -> Iterator[Fault]:
    """Prompt and generation, of which a few tokens can be timed."""
    if not config.lengths:
        yield Fault("--lengths", "", "there is nothing to measure", "write for example 512+512")
    for text in config.lengths:
        found = _LENGTHS.fullmatch(text)
        if found is None:
            form = "two numbers of tokens, of a prompt and of what follows, at most 9999999 each"
            yield Fault("--lengths", text, form, "write for example 512+512")
        elif int(found[2]) < _LEAST_GENERATED:
            least = f"a generation has at least {_LEAST_GENERATED} tokens, so that it can be timed"
            yield Fault("--lengths", text, least, f"write {found[1]}+{_LEAST_GENERATED}")


@rule("load hf")
def _one_model(config: BenchConfig) -> Iterator[Fault]:
    if config.load is not None and config.hf is not None:
        rule_text = "one model is measured"
        yield Fault("--load, --hf", config.load, rule_text, "give either --load or --hf")


@rule("output")
def _figures_can_be_drawn(config: BenchConfig) -> Iterator[Fault]:
    if config.output is not None and importlib.util.find_spec("matplotlib") is None:
        rule_text = "figures need the package matplotlib, which is not installed"
        fix = "pip install matplotlib, or leave --output out and use --json"
        yield Fault("--output", config.output, rule_text, fix)


@rule("num_layers kv_pattern kv_layers kv_map window_size load hf")
def _maps_are_valid(config: BenchConfig) -> Iterator[Fault]:
    """Of a checkpoint the number of layers is not known yet."""
    if config.load is None and config.hf is None:
        try:
            maps(config, config.model.num_layers)
        except MapError as error:
            yield from error.faults


@rule("kv_pattern kv_layers load hf")
def _kv_layers_are_taken(config: BenchConfig) -> Iterator[Fault]:
    is_usual = not (config.kv_pattern or config.kv_map or config.load or config.hf)
    if config.kv_layers and not is_usual and not any(map(takes_kv_layers, config.kv_pattern)):
        rule_text = "none of the maps takes a number of KV layers"
        fix = "leave it out, or name one that does in --kv-pattern, for example sandwich-top"
        yield Fault("--kv-layers", " ".join(map(str, config.kv_layers)), rule_text, fix)


RULES = (
    _lengths_are_pairs,
    _one_model,
    heads_fit,
    groups_fit,
    _kv_layers_are_taken,
    _maps_are_valid,
    _figures_can_be_drawn,
)


def with_sizes(argv: Sequence[str]) -> list[str]:
    """The sizes that ``--shape`` stands for, ahead of those that are given; an explicit map says
    how many layers there are.

    Raises:
        ConfigError: sizes beside a checkpoint, which has its own.
    """
    given = {each.key: each.values for each in read_arguments(argv)[0]}
    if {"load", "hf"} & given.keys():
        _check_no_sizes(given)
        return list(argv)
    sizes: dict[str, int | bool] = {}
    if "config" not in given or "shape" in given:
        sizes |= SHAPES.get("".join(given.get("shape") or (_USUAL_SHAPE,)), {})
    if given.get("kv_map") and "shape" not in given:
        sizes["num_layers"] = len((given["kv_map"] or ("",))[0].strip().split("_"))
    flags: list[str] = []
    for name, value in sizes.items():
        flags += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return [*flags, *argv]


def _check_no_sizes(given: Mapping[str, tuple[str, ...] | None]) -> None:
    sizes = {each.name for each in settings_of(ModelConfig)} - {"bf16"} | {"shape"}
    faults = [
        Fault(
            flag_of(key),
            " ".join(given[key] or ()),
            "a checkpoint has its own sizes",
            f"leave {flag_of(key)} out, or --load and --hf",
        )
        for key in given
        if key in sizes
    ]
    if faults:
        raise ConfigError(faults)


def maps(config: BenchConfig, num_layers: int) -> list[NamedMap]:
    """All that are asked for beside the standard one.

    Raises:
        MapError: everything that is wrong with them.
    """
    faults: list[Fault] = []
    found: dict[str, NamedMap] = {}
    for name, (family, asked) in _asked(config, num_layers).items():
        try:
            found[name] = NamedMap(name, family, build_map(num_layers, **asked))
            faults += window_faults(found[name].map, config.window_size)
        except MapError as error:
            faults += error.faults
    if faults:
        raise MapError(list(dict.fromkeys(faults)))
    return list(found.values())


def _asked(config: BenchConfig, num_layers: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: the family, and what :func:`build_map` is told."""
    patterns = config.kv_pattern
    if not (patterns or config.kv_map or config.load or config.hf):
        patterns = _USUAL_PATTERNS
    counts = config.kv_layers or tuple(-(-num_layers // part) for part in (2, 4))
    asked: dict[str, tuple[str, dict[str, Any]]] = {}
    for pattern in patterns:
        if takes_kv_layers(pattern):
            for count in counts:
                arguments = {"pattern": pattern, "kv_layers": count}
                asked[f"{pattern} {count}"] = (pattern, arguments)
        elif pattern != _STANDARD:
            asked[pattern] = (pattern, {"pattern": pattern})
    for text in config.kv_map:
        asked[text] = (text, {"kv_map": text})
    return asked
