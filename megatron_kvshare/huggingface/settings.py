"""``config.json`` and the description of a model, in both directions by the same tables (L5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_kvshare.checkpoint.description import ModelDescription
from megatron_kvshare.config import ModelConfig
from megatron_kvshare.errors import CheckpointError, Fault, MapError
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import Recipe, Solver, Start

MODEL_TYPE = "kvshare"

# Setting of ours -> key of config.json.
_NUMBERS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
}
_LLAMA3 = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_positions": "original_max_position_embeddings",
}
_RECIPE = {
    "forward_sweeps": "iter_forward_passes",
    "backward_sweeps": "iter_backward_passes",
    "project_at_use": "iter_project_at_use",
}
_LLAMA_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""What a Llama-shaped model may say of itself, and the one value that is built here."""

_AUTO_MAP = {
    "AutoConfig": "configuration_kvshare.KVShareConfig",
    "AutoModel": "modeling_kvshare.KVShareModel",
    "AutoModelForCausalLM": "modeling_kvshare.KVShareForCausalLM",
}


def is_plain_llama(map: SharingMap) -> bool:
    """Whether transformers' own Llama computes the map: every layer its own KV, no windows."""
    return map.producers == tuple(range(map.num_layers)) and not any(map.windowed)


def to_config(
    description: ModelDescription, dtype: torch.dtype, tokens: Mapping[str, int]
) -> dict[str, Any]:
    """The content of ``config.json``; ``tokens``: ``bos_token_id``, ``eos_token_id`` as far as
    there are any."""
    model = description.model
    values = {**vars(model), "num_query_groups": model.query_groups, "kv_channels": model.head_dim}
    values["max_position_embeddings"] = model.max_positions
    config: dict[str, Any] = {theirs: values[ours] for ours, theirs in _NUMBERS.items()}
    config["vocab_size"] = description.vocab_size
    config["tie_word_embeddings"] = not model.untie_embeddings_and_output_weights
    config["dtype"] = str(dtype).removeprefix("torch.")
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **tokens}
    scaling = None
    if model.use_rope_scaling:
        scaling = {"rope_type": "llama3", **{key: values[ours] for ours, key in _LLAMA3.items()}}
    if is_plain_llama(description.map):
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_LLAMA_ONLY}
        return config | {"rope_theta": model.rotary_base, "rope_scaling": scaling}
    config |= {"model_type": MODEL_TYPE, "architectures": ["KVShareForCausalLM"]}
    rope = {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"})}
    return config | {"auto_map": _AUTO_MAP, "rope_parameters": rope, **_sharing(description)}


def _sharing(description: ModelDescription) -> dict[str, Any]:
    map, recipe = description.map, description.recipe
    layers = {
        "kv_source_layers": list(map.sources),
        "kv_windowed_layers": [layer for layer, on in enumerate(map.windowed) if on],
        "kv_window_size": description.window_size if any(map.windowed) else None,
    }
    if not map.is_cyclic:
        return layers
    return {
        **layers,
        **{theirs: getattr(recipe, ours) for ours, theirs in _RECIPE.items()},
        "iter_stride": recipe.stride if recipe.solver is Solver.STRIDED else 1,
        "iter_start": str(recipe.start),
        "kv_prefill": "trained",
    }


def from_config(config: Mapping[str, Any]) -> ModelDescription:
    """The model that a ``config.json`` describes.

    Raises:
        CheckpointError: with everything that cannot be built here, and why.
    """
    reader = _Reader(config)
    description = reader.description()
    if reader.faults or description is None:
        raise CheckpointError(reader.faults)
    return description


def shape_flags(config: Mapping[str, Any]) -> list[str]:
    """The flags of ``kvshare pretrain`` for the shape that a ``config.json`` describes."""
    model = from_config(config).model
    names = [*_NUMBERS, "rotary_base"]
    return [
        word
        for name in names
        for word in (f"--{name.replace('_', '-')}", str(getattr(model, name)))
    ]


class _Reader:
    """Collects what is wrong while it translates."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.faults: list[Fault] = []

    def fault(self, key: str, rule: str, fix: str) -> None:
        self.faults.append(Fault(f"config.json: {key}", self.config.get(key), rule, fix))

    def description(self) -> ModelDescription | None:
        kinds = {
            MODEL_TYPE: self._kvshare,
            "llama": self._llama,
            "mistral": self._mistral,
            "lckv-llama": self._lckv,
        }
        kind = self.config.get("model_type")
        if kind not in kinds:
            rule = f"only {', '.join(kinds)} can be imported"
            self.fault("model_type", rule, "convert a model of one of these architectures")
            return None
        if self.config.get("quantization_config"):
            rule = "the weights are quantised"
            self.fault("quantization_config", rule, "import the original weights, or dequantise")
        for key, value in _LLAMA_ONLY.items():
            if self.config.get(key, value) not in (value, None):
                rule = f"the model here is built with {value!r} only"
                self.fault(key, rule, "this model cannot be imported")
        settings = self._numbers() | self._rope()
        vocab_size = self._whole("vocab_size")
        if self.faults:
            return None
        try:
            sharing = kinds[kind](int(settings["num_layers"]))
            model = ModelConfig(
                **settings,
                seq_length=settings["max_position_embeddings"],
                untie_embeddings_and_output_weights=not self.config.get(
                    "tie_word_embeddings", kind == MODEL_TYPE
                ),
                bf16=self.config.get("dtype", self.config.get("torch_dtype")) == "bfloat16",
            )
        except MapError as error:
            self.faults += error.faults
            return None
        except ValueError as error:
            self.faults.append(Fault("config.json", str(error), "a value is not usable", "mend it"))
            return None
        return ModelDescription(model=model, vocab_size=vocab_size, **sharing)

    def _whole(self, key: str) -> int:
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fault(key, "it must be a whole number above 0", "mend config.json")
            return 1
        return value

    def _numbers(self) -> dict[str, Any]:
        whole = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        heads = {key: self._whole(key) for key in (*whole, "max_position_embeddings")}
        config = {**self.config, **heads}
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = heads["num_attention_heads"]
        if config.get("head_dim") is None:
            config["head_dim"] = heads["hidden_size"] // heads["num_attention_heads"]
        usual = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
        values = {ours: config.get(key, usual.get(key)) for ours, key in _NUMBERS.items()}
        if heads["num_attention_heads"] % (values["num_query_groups"] or 1):
            rule = f"it must divide num_attention_heads {heads['num_attention_heads']}"
            self.fault("num_key_value_heads", rule, "mend config.json")
        return values

    def _rope(self) -> dict[str, Any]:
        rope = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        base = rope.get("rope_theta", self.config.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            self.fault("rope_parameters", "heads are rotated whole here", "it cannot be imported")
        if kind == "default":
            return {"rotary_base": base}
        missing = [key for key in _LLAMA3.values() if key not in rope]
        if kind != "llama3" or missing:
            rule = f"only default and complete llama3 scaling are known (missing: {missing})"
            self.fault("rope_scaling", rule, "this model cannot be imported")
            return {}
        scaling = {ours: rope[key] for ours, key in _LLAMA3.items()}
        return {"rotary_base": base, "use_rope_scaling": True, **scaling}

    def _kvshare(self, layers: int) -> dict[str, Any]:
        sources = self.config.get("kv_source_layers") or []
        on = set(self.config.get("kv_windowed_layers") or ())
        windowed = tuple(layer in on for layer in range(len(sources)))
        map = self._of_depth(SharingMap(tuple(sources), windowed), layers, "kv_source_layers")
        stride = self.config.get("iter_stride", 1)
        recipe = Recipe(
            solver=Solver.JACOBI if stride == 1 else Solver.STRIDED,
            stride=stride,
            start=Start(self.config.get("iter_start", "zero")),
            **{ours: self.config[key] for ours, key in _RECIPE.items() if key in self.config},
        )
        if on and not self.config.get("kv_window_size"):
            self.fault("kv_window_size", "kv_windowed_layers needs it", "mend config.json")
        return {"map": map, "recipe": recipe, "window_size": self.config.get("kv_window_size")}

    def _of_depth(self, map: SharingMap, layers: int, key: str) -> SharingMap:
        if map.num_layers != layers:
            rule = f"the map is for {map.num_layers} layers, the model has {layers}"
            raise MapError(Fault(f"config.json: {key}", map.notation, rule, "mend config.json"))
        return map

    def _llama(self, layers: int) -> dict[str, Any]:
        return {"map": build_map(layers, "standard")}

    def _mistral(self, layers: int) -> dict[str, Any]:
        """All layers have the window, or none; newer files also list the kind of every layer."""
        window = self.config.get("sliding_window", 4096)  # what transformers takes, left out
        kinds = self.config.get("layer_types") or ["sliding_attention"] * layers
        on = tuple(bool(window) and kind == "sliding_attention" for kind in kinds)
        map = self._of_depth(SharingMap(tuple(range(len(on))), on), layers, "layer_types")
        return {"map": map, "window_size": window if any(on) else None}

    def _lckv(self, layers: int) -> dict[str, Any]:
        """Published checkpoints of the method: the map is a string, as in --kv-map."""
        notation = self.config.get("layer_types") or "_".join(map(str, range(layers)))
        map_ = self._of_depth(SharingMap.parse(notation), layers, "layer_types")
        theirs = {f"{kind}_sweeps": f"{kind}_passes" for kind in ("forward", "backward")}
        sweeps = {ours: self.config.get(key) for ours, key in theirs.items()}
        recipe = Recipe(**{ours: value for ours, value in sweeps.items() if value is not None})
        window = self.config.get("sliding_window") if any(map_.windowed) else None
        return {"map": map_, "recipe": recipe, "window_size": window}
