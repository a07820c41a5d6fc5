"""What vLLM can serve of an export, and with which of its settings (no torch, no vLLM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from megatron_kvshare.conversion.config_keys import value_faults
from megatron_kvshare.errors import Fault, runs
from megatron_kvshare.rope import ROPE_SETTINGS
from megatron_kvshare.sharing.map import SharingMap

_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that vLLM computes as transformers does."""
_ROPE_NEEDS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
"""Of the settings that a kind reads, those that vLLM has no value for by itself."""
_ROPE_WHY_NOT = {
    "dynamic": "vLLM scales by one fixed length, transformers by the length of the text",
    "longrope": "vLLM chooses its factors by --max-model-len, transformers by the length of the "
    "text",
}
_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""Types of a KV cache that need nothing of the layer that wrote it."""


class Sharing(Protocol):
    """The keys of ``config.json`` that say which layer reads what."""

    kv_source_layers: list[int]
    kv_windowed_layers: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The settings of vLLM that sharing has to do with.

    ``stages``: the layers of each pipeline stage; ``unquantised_layers``: vLLM's
    ``kv_cache_dtype_skip_layers``; ``longest``: its ``max_model_len``.
    """

    stages: tuple[range, ...]
    tensor_ranks: int
    context_ranks: int
    fast_prefill: bool
    adapters: bool
    cache_dtype: str
    unquantised_layers: tuple[str, ...]
    longest: int


def sharing_of(config: Sharing) -> SharingMap:
    """The map of a configuration, which has been checked to hold one."""
    windowed = set(config.kv_windowed_layers)
    sources = tuple(config.kv_source_layers)
    return SharingMap(sources, tuple(layer in windowed for layer in range(len(sources))))


def keeps_all_tokens(sharing: SharingMap, layer: int) -> bool:
    """Whether a layer with a window must keep what is older, since another one reads it."""
    readers = sharing.consumers_of(layer)
    return sharing.windowed[layer] and not all(sharing.windowed[reader] for reader in readers)


def target_name(sharing: SharingMap, layer: int, prefix: str) -> str | None:
    """The name of the attention whose cache ``layer`` reads, None for its own; ``prefix``: the name
    of its attention block, as ``model.layers.3.self_attn``."""
    if sharing.is_producer(layer):
        return None
    before, found, after = prefix.rpartition(f".{layer}.")
    assert found, f"{prefix} is not a part of layer {layer}"
    return f"{before}.{sharing.sources[layer]}.{after}.attn"


def rope_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM is told of the rotary embedding: keys that transformers would not read are left
    out, and a whole factor becomes the float that vLLM wants."""
    keys = ("rope_type", "rope_theta", *_rope_keys(given["rope_type"]))
    told = {key: given[key] for key in keys if given.get(key) is not None}
    return told | ({"factor": float(told["factor"])} if "factor" in told else {})


def _rope_keys(kind: str) -> tuple[str, ...]:
    """What a kind reads beside its base."""
    return tuple(ROPE_SETTINGS.get(kind, {}).values())


def faults(config: Mapping[str, Any], sharing: SharingMap, engine: Engine) -> list[Fault]:
    """Everything that vLLM cannot serve, or would serve wrongly, of ``config`` by ``engine``."""
    return [*_model_faults(config, sharing, engine), *_engine_faults(sharing, engine)]


def _model_faults(
    config: Mapping[str, Any], sharing: SharingMap, engine: Engine
) -> Iterator[Fault]:
    for fault in value_faults(config):
        yield dataclasses.replace(fault, fix="this model cannot be served")
    if config.get("quantization_config"):
        rule = "scales of quantised keys and values belong to a layer, here several read them"
        fix = "export the weights as they were trained; vLLM's --quantization can be used on them"
        where = "config.json: quantization_config"
        yield Fault(where, config["quantization_config"], rule, fix)
    if sharing.is_cyclic:
        upward = [layer for layer in range(sharing.num_layers) if sharing.is_upward(layer)]
        rule = f"vLLM lets a layer read lower ones only, a higher one is read by {_named(upward)}"
        fix = "`kvshare serve` serves this model"
        yield Fault("config.json: kv_source_layers", sharing.notation, rule, fix)
    yield from _rope_faults(config["rope_parameters"], engine)
    heads, ranks = config["num_key_value_heads"], engine.tensor_ranks
    if heads % ranks and ranks % heads:
        rule = f"one of it and the {heads} key-value heads must divide the other"
        yield Fault("--tensor-parallel-size", ranks, rule, "use another size")


def _rope_faults(rope: Mapping[str, Any], engine: Engine) -> Iterator[Fault]:
    where, fix = "config.json: rope_parameters", "transformers generates with this model"
    kind = rope["rope_type"]
    if kind not in _ROPE:
        usual = f"vLLM's are known to equal transformers' for {', '.join(_ROPE)} only"
        yield Fault(where, dict(rope), _ROPE_WHY_NOT.get(kind, usual), fix)
        return
    needed = (key for key in _rope_keys(kind) if key in _ROPE_NEEDS)
    missing = [key for key in needed if rope.get(key) is None]
    if missing:
        rule = f"vLLM needs {', '.join(missing)} for {kind!r}"
        yield Fault(where, dict(rope), rule, "write into config.json what training used")
    elif kind == "yarn":
        longest = int(rope["original_max_position_embeddings"] * rope["factor"])
        if engine.longest > longest:
            rule = f"vLLM's table for this yarn ends at {longest} positions (original x factor)"
            yield Fault("--max-model-len", engine.longest, rule, f"give --max-model-len {longest}")


def _engine_faults(sharing: SharingMap, engine: Engine) -> Iterator[Fault]:
    if engine.fast_prefill:
        rule = "the model would have to leave out layers for it, without that its text is wrong"
        yield Fault("--kv-sharing-fast-prefill", True, rule, "leave it out")
    if engine.adapters:
        rule = "adapters have not been tried on layers that project queries alone"
        yield Fault("--enable-lora", True, rule, "merge the adapter into the weights of the export")
    cut = [
        layer for stage in engine.stages for layer in stage if sharing.sources[layer] not in stage
    ]
    if cut:
        rule = f"keys and values of another stage are read by {_named(cut)}"
        fix = "use --tensor-parallel-size, or stages (VLLM_PP_LAYER_PARTITION) that cut no group"
        yield Fault("--pipeline-parallel-size", len(engine.stages), rule, fix)
    if engine.context_ranks > 1:
        rule = "layers without keys of their own have none to exchange between ranks"
        fix = "use --tensor-parallel-size"
        where = "--decode-context-parallel-size, --prefill-context-parallel-size"
        yield Fault(where, engine.context_ranks, rule, fix)
    if engine.cache_dtype not in _CACHE_DTYPES:
        rule = f"keys and values that several layers read can be {', '.join(_CACHE_DTYPES)}"
        yield Fault("--kv-cache-dtype", engine.cache_dtype, rule, "use one of these")
    split = [
        layer
        for layer, source in enumerate(sharing.sources)
        if _unquantised(sharing, layer, engine) != _unquantised(sharing, source, engine)
    ]
    if split:
        rule = f"another type than the source writes would be read by {_named(split)}"
        fix = "name a source together with all its readers, or none of them"
        where = "--kv-cache-dtype-skip-layers"
        yield Fault(where, list(engine.unquantised_layers), rule, fix)


def _unquantised(sharing: SharingMap, layer: int, engine: Engine) -> bool:
    named = engine.unquantised_layers
    return str(layer) in named or (sharing.windowed[layer] and "sliding_window" in named)


def _named(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {runs(layers)}"
