"""``config.json`` and the description of a model, in both directions by the same tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.conversion.config_keys import (
    LCKV,
    LLAMA,
    MISTRAL,
    MODEL_TYPE,
    value_faults,
)
from megatron_kvshare.errors import CheckpointError, Fault, MapError
from megatron_kvshare.rope import ROPE_SETTINGS
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import Recipe, Solver, Start
from megatron_kvshare.spec.model_spec import ModelSpec

_MOST_LAYERS = 10_000
"""More are a mistake, and would take minutes to lay out."""
_MOST_SWEEPS = 1000
"""Or as many as there are tokens: more change nothing, and take for ever."""

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
_ORIGINAL = "original_max_position_embeddings"
_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "attention_factor")
_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")
"""Numbers of a rotary embedding that have no usual value."""
_RECIPE = {
    "forward_sweeps": "iter_forward_passes",
    "backward_sweeps": "iter_backward_passes",
    "project_at_use": "iter_project_at_use",
}
_LLAMA_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""What an exported Llama says of itself."""
_LEFT_OUT = {
    MODEL_TYPE: {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    LLAMA: {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    MISTRAL: {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": 8},
    LCKV: {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}
"""What each kind of model takes for a key that its file leaves out."""

_AUTO_MAP = {
    "AutoConfig": "configuration_kvshare.KVShareConfig",
    "AutoModel": "modeling_kvshare.KVShareModel",
    "AutoModelForCausalLM": "modeling_kvshare.KVShareForCausalLM",
    "AutoModelForSequenceClassification": "modeling_kvshare.KVShareForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_kvshare.KVShareForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_kvshare.KVShareForQuestionAnswering",
}


def is_plain_llama(map: SharingMap) -> bool:
    """Whether transformers' own Llama computes the map: every layer its own KV, no windows."""
    return map.producers == tuple(range(map.num_layers)) and not any(map.windowed)


def to_config(spec: ModelSpec, dtype: torch.dtype, tokens: Mapping[str, int]) -> dict[str, Any]:
    """The content of ``config.json``; ``tokens``: ``bos_token_id``, ``eos_token_id`` as far as
    there are any."""
    model = spec.model
    values = {**vars(model), "num_query_groups": model.query_groups, "kv_channels": model.head_dim}
    values["max_position_embeddings"] = model.max_positions
    config: dict[str, Any] = {theirs: values[ours] for ours, theirs in _NUMBERS.items()}
    config["vocab_size"] = spec.vocab_size
    config["tie_word_embeddings"] = not model.untie_embeddings_and_output_weights
    config["dtype"] = str(dtype).removeprefix("torch.")
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **tokens}
    scaling = None
    if model.rope_scaling is not None:
        given = {key: values[ours] for ours, key in ROPE_SETTINGS[model.rope_scaling].items()}
        given = {key: value for key, value in given.items() if value is not None}
        scaling = {"rope_type": model.rope_scaling, **given}
    if is_plain_llama(spec.map):
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_LLAMA_ONLY}
        return config | {"rope_theta": model.rotary_base, "rope_scaling": scaling}
    config |= {"model_type": MODEL_TYPE, "architectures": ["KVShareForCausalLM"]}
    rope = {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"})}
    return config | {"auto_map": _AUTO_MAP, "rope_parameters": rope, **_sharing(spec)}


def _sharing(spec: ModelSpec) -> dict[str, Any]:
    map, recipe = spec.map, spec.recipe
    layers = {
        "kv_source_layers": list(map.sources),
        "kv_windowed_layers": [layer for layer, on in enumerate(map.windowed) if on],
        "kv_window_size": spec.window_size if any(map.windowed) else None,
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


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a ``config.json`` describes.

    Raises:
        CheckpointError: with everything that cannot be built here, and why.
    """
    reader = _Reader(config)
    spec = reader.spec()
    if reader.faults or spec is None:
        raise CheckpointError(reader.faults)
    return spec


class _Reader:
    """Collects what is wrong while it translates."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.faults: list[Fault] = []

    def fault(self, key: str, rule: str, fix: str = "mend config.json") -> None:
        self.faults.append(Fault(f"config.json: {key}", self.config.get(key), rule, fix))

    def spec(self) -> ModelSpec | None:
        kinds = {
            MODEL_TYPE: self._kvshare,
            LLAMA: self._llama,
            MISTRAL: self._mistral,
            LCKV: self._lckv,
        }
        kind = self.config.get("model_type")
        if not isinstance(kind, str) or kind not in kinds:
            rule = f"only {', '.join(kinds)} can be imported"
            self.fault("model_type", rule, "convert a model of one of these architectures")
            return None
        self.config = {**_LEFT_OUT[kind], **self.config}
        if self.config.get("quantization_config"):
            rule = "the weights are quantised"
            self.fault("quantization_config", rule, "import the original weights, or dequantise")
        self.faults += value_faults(self.config)
        settings = self._numbers() | self._rope()
        vocab_size, tied = self._whole("vocab_size"), self._switch("tie_word_embeddings")
        if self.faults:
            return None
        try:
            sharing = kinds[kind](settings["num_layers"])
            model = ModelConfig(
                **settings,
                seq_length=settings["max_position_embeddings"],
                untie_embeddings_and_output_weights=not tied,
            )
        except MapError as error:
            self.faults += error.faults
            return None
        except ValueError as error:
            self.faults.append(Fault("config.json", str(error), "a value is not usable", "mend it"))
            return None
        if self.faults:
            return None
        return ModelSpec(model=model, vocab_size=vocab_size, **sharing)

    def _whole(self, key: str, least: int = 1, most: int | None = None) -> int:
        value = self.config.get(key)
        if not _is_whole(value) or value < least or (most is not None and value > most):
            limit = "" if most is None else f" and at most {most:,}"
            self.fault(key, f"it must be a whole number above {least - 1}{limit}")
            return least
        return value

    def _switch(self, key: str) -> bool:
        value = self.config.get(key)
        if not isinstance(value, bool):
            self.fault(key, "it must be true or false")
        return bool(value)

    def _layers(self, key: str) -> tuple[int, ...]:
        """A list of layer numbers."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(map(_is_whole, value)):
            self.fault(key, "it must be a list of layer numbers")
            return ()
        return tuple(value)

    def _numbers(self) -> dict[str, Any]:
        heads = self._whole("num_attention_heads")
        values: dict[str, Any] = {
            "num_layers": self._whole("num_hidden_layers", most=_MOST_LAYERS),
            "num_attention_heads": heads,
            "norm_epsilon": self._number("rms_norm_eps"),
        }
        for ours in ("hidden_size", "ffn_hidden_size", "max_position_embeddings"):
            values[ours] = self._whole(_NUMBERS[ours])
        for ours, usual in (
            ("num_query_groups", heads),
            ("kv_channels", values["hidden_size"] // heads),
        ):
            given = self.config.get(_NUMBERS[ours]) is not None
            values[ours] = self._whole(_NUMBERS[ours]) if given else usual
        if self.config.get("initializer_range") is not None:
            values["init_method_std"] = self._number("initializer_range", zero=True)
        if heads % values["num_query_groups"]:
            self.fault("num_key_value_heads", f"it must divide num_attention_heads {heads}")
        if values["kv_channels"] % 2 or not values["kv_channels"]:
            self.fault("head_dim", "the width of a head must be even, for the rotary embedding")
        return values

    def _number(self, key: str, zero: bool = False) -> float:
        value = self.config.get(key)
        if not _is_number(value) or value < 0 or (value == 0 and not zero):
            self.fault(key, f"it must be a number {'from' if zero else 'above'} 0")
            return 1.0
        return float(value)

    def _rope(self) -> dict[str, Any]:
        """As transformers reads it: ``rope_scaling`` is the earlier name of ``rope_parameters``."""
        given = {}
        for key in ("rope_scaling", "rope_parameters"):
            value = self.config.get(key)
            if isinstance(value, dict) and value:
                given[key] = value
            elif value not in (None, {}):
                self.fault(key, "it must hold an object")
        if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
            self.fault(
                "rope_scaling", f"rope_parameters says otherwise: {given['rope_parameters']}"
            )
        rope = {"rope_theta": self.config.get("rope_theta", 10000.0)}
        rope |= next(iter(given.values()), {})
        where = next(iter(given), "rope_theta")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            self.fault(where, "heads are rotated whole here", "it cannot be imported")
        if not isinstance(kind, str) or kind not in ("default", *ROPE_SETTINGS):
            rule = f"rope_type {kind!r} is not one of default, {', '.join(ROPE_SETTINGS)}"
            self.fault(where, rule, "this model cannot be imported")
            return {}
        settings = {"rotary_base": self._rope_value(where, "rope_theta", rope["rope_theta"])}
        if kind == "default":
            return settings
        named = {"use_rope_scaling": True} if kind == "llama3" else {"rope_scaling_type": kind}
        return settings | named | self._stretching(kind, rope, where)

    def _stretching(self, kind: str, rope: dict[str, Any], where: str) -> dict[str, Any]:
        known = ROPE_SETTINGS[kind]
        if _ORIGINAL in known.values():
            self._original_positions(rope, where)
        missing = [key for key in known.values() if key in _NEEDED and rope.get(key) is None]
        if missing:
            rule = f"rope_type {kind!r} is incomplete (missing: {missing})"
            self.fault(where, rule, "this model cannot be imported")
        if kind == "yarn" and _is_number(rope["rope_theta"]) and rope["rope_theta"] <= 1:
            self.fault(where, "rope_theta must be above 1 for yarn")
        if kind == "dynamic" and self.config.get("head_dim") == 2:
            self.fault(where, "dynamic stretching needs heads wider than 2")
        return {
            ours: self._rope_value(where, key, rope[key])
            for ours, key in known.items()
            if rope.get(key) is not None
        }

    def _original_positions(self, rope: dict[str, Any], where: str) -> None:
        """Left out it is the declared length; older files have it beside the other parameters."""
        outside = self.config.get(_ORIGINAL)
        if None not in (outside, rope.get(_ORIGINAL)) and outside != rope[_ORIGINAL]:
            self.fault(_ORIGINAL, f"{where} says otherwise: {rope[_ORIGINAL]!r}")
        if rope.get(_ORIGINAL) is None:
            rope[_ORIGINAL] = outside or self.config.get("max_position_embeddings")

    def _rope_value(self, where: str, key: str, value: Any) -> Any:
        if key == "truncate":
            if not isinstance(value, bool):
                self.fault(where, f"{key} must be true or false, not {value!r}")
            return bool(value)
        least = "from" if key in _MAY_BE_ZERO else "above"
        if not _is_number(value) or value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
            self.fault(where, f"{key} must be a number {least} 0, not {value!r}")
            return 1
        if key == _ORIGINAL and value != int(value):
            self.fault(where, f"{key} must be a whole number, not {value!r}")
            return 1
        return int(value) if key == _ORIGINAL else value

    def _kvshare(self, layers: int) -> dict[str, Any]:
        on = self._layers("kv_windowed_layers")
        if not set(on) <= set(range(layers)):
            self.fault("kv_windowed_layers", f"layers are 0 to {layers - 1}")
        sources = self._layers("kv_source_layers")
        windowed = tuple(layer in on for layer in range(len(sources)))
        map = self._of_depth(SharingMap(sources, windowed), layers, "kv_source_layers")
        recipe = self._recipe()
        window = None
        if self.config.get("kv_window_size") is not None:
            window = self._whole("kv_window_size")
        elif on:
            self.fault("kv_window_size", "kv_windowed_layers needs it")
        if map.is_cyclic and self.config.get("kv_prefill", "trained") != "trained":
            rule = "prompts are computed as in training here"
            fix = 'set it to "trained"; it can be chosen anew in from_pretrained'
            self.fault("kv_prefill", rule, fix)
        return {"map": map, "recipe": recipe, "window_size": window if on else None}

    def _recipe(self) -> Recipe:
        usual = {"iter_forward_passes": 7, "iter_backward_passes": 2, "iter_stride": 1}
        usual |= {"iter_project_at_use": False, "iter_start": "zero"}
        self.config = {**usual, **self.config}
        most = max(_MOST_SWEEPS, self.config["max_position_embeddings"])
        stride = self._whole("iter_stride", least=0, most=most)
        sweeps = {
            ours: self._whole(key, least=0, most=most) for ours, key in list(_RECIPE.items())[:2]
        }
        return Recipe(
            solver=Solver.JACOBI if stride == 1 else Solver.STRIDED,
            stride=stride,
            start=Start(self.config["iter_start"]),
            project_at_use=self._switch("iter_project_at_use"),
            **sweeps,
        )

    def _of_depth(self, map: SharingMap, layers: int, key: str) -> SharingMap:
        if map.num_layers != layers:
            rule = f"the map is for {map.num_layers} layers, the model has {layers}"
            raise MapError(Fault(f"config.json: {key}", map.notation, rule, "mend config.json"))
        return map

    def _llama(self, layers: int) -> dict[str, Any]:
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        if hidden % heads:
            self.fault("hidden_size", f"a Llama's must be a multiple of its {heads} heads")
        return {"map": build_map(layers, "standard")}

    def _mistral(self, layers: int) -> dict[str, Any]:
        """All layers have the window, or none."""
        self.config = {"sliding_window": 4096, **self.config}  # what transformers takes, left out
        window = None
        if self.config["sliding_window"] is not None:
            window = self._whole("sliding_window")
        kinds = self.config.get("layer_types")
        one = "full_attention" if window is None else "sliding_attention"
        if kinds is not None and kinds != [one] * layers:
            rule = f"transformers' Mistral does not read it; with this sliding_window it is {one}"
            self.fault("layer_types", rule, f"write {one} for each of the {layers} layers")
        map = SharingMap(tuple(range(layers)), (window is not None,) * layers)
        return {"map": map, "window_size": window}

    def _lckv(self, layers: int) -> dict[str, Any]:
        """Published checkpoints of the method: the map is a string, as in --kv-map."""
        usual = {"sliding_window": 4096, "forward_passes": 7, "backward_passes": 2}
        self.config = {**usual, **self.config}
        notation = self.config.get("layer_types")
        if notation is None:
            notation = "_".join(map(str, range(layers)))
        if not isinstance(notation, str):
            rule = "it must name the source of every layer, as 0_2_2_3"
            raise MapError(Fault("config.json: layer_types", notation, rule, "mend config.json"))
        map_ = self._of_depth(SharingMap.parse(notation), layers, "layer_types")
        kinds = ("forward", "backward")
        most = max(_MOST_SWEEPS, self.config["max_position_embeddings"])
        sweeps = {
            f"{kind}_sweeps": self._whole(f"{kind}_passes", least=0, most=most) for kind in kinds
        }
        window = None
        if any(map_.windowed) and self.config["sliding_window"] is not None:
            window = self._whole("sliding_window")
        elif any(map_.windowed):  # their code then leaves the windows out
            map_ = SharingMap(map_.sources, (False,) * layers)
        return {"map": map_, "recipe": Recipe(**sweeps), "window_size": window}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    most = sys.float_info.max  # JSON has whole numbers that no float holds
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= most
