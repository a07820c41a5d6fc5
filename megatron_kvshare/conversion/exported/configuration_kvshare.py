"""Configuration of a Llama-shaped decoder whose layers share keys and values.

This file travels with every exported model and needs nothing but transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_BUILT_IN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "sliding_window": None,
    "layer_types": None,
    "pruned_heads": {},
    "torchscript": False,
}
"""Settings of Llama and of all models, and the one value of each that is computed here."""

_OLDER_ROPE = (
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError("config.json of a kvshare model: " + "; ".join(faults))


def _one_rope(
    given: Mapping[str, Any] | None, older: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """``rope_parameters`` of themselves and of what older files say beside them; contradictions."""
    beside = {name: value for name, value in older.items() if value is not None}
    rope: dict[str, Any] = {}
    faults = []
    for said in (dict(given or {}), dict(beside.pop("rope_scaling", {})), beside):
        if "type" in said:
            said.setdefault("rope_type", said.pop("type"))
        for name, value in said.items():
            if rope.setdefault(name, value) != value:
                faults.append(f"{name} is {rope[name]!r} in one place and {value!r} in another")
    return {"rope_type": "default", "rope_theta": 10000.0, **rope}, faults


class KVShareConfig(PretrainedConfig):
    """Layer ``i`` reads the keys and values of layer ``kv_source_layers[i]``.

    A layer that reads itself owns keys and values; only such layers have a KV cache. A layer that
    reads a higher one is *upward*: its mask is strictly causal, and the layers from it up to its
    source are iterated, as arXiv 2410.14442 describes:

    * ``iter_forward_passes`` sweeps without and ``iter_backward_passes`` with gradient;
    * ``iter_stride`` > 1: a sweep visits the tokens ``t % stride == 0, 1, ...`` one subset after
      another, and each reads what the subsets before it have refreshed;
    * ``iter_start``: the first sweep reads nothing (``zero``), projections of the iterated layers'
      input (``input``), or of every layer's own input in one more sweep (``self``);
    * ``iter_project_at_use``: between sweeps without and with gradient the inputs of keys and
      values are kept, and projected again with gradient;
    * ``kv_prefill``: what computes prompts and texts outside training: the sweeps of training
      (``trained``), two strided ones that give nearly the loss of exact evaluation
      (``converged``), or sweeps until nothing moves (``exact``).

    ``kv_windowed_layers`` see the last ``kv_window_size`` tokens only, the token itself counted.

    ``rope_parameters`` are those of transformers' Llama; ``rope_scaling`` and ``rope_theta``, their
    older form, are taken too. Any other setting of Llama must have the value that is built in here.
    """

    model_type = "kvshare"
    # As transformers reads it, by the name before and from 5.24.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 22,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        kv_source_layers: Sequence[int] | None = None,
        kv_windowed_layers: Sequence[int] = (),
        kv_window_size: int | None = None,
        iter_forward_passes: int = 7,
        iter_backward_passes: int = 2,
        iter_stride: int = 1,
        iter_start: str = "zero",
        iter_project_at_use: bool = False,
        kv_prefill: str = "trained",
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        older = {name: kwargs.pop(name, None) for name in _OLDER_ROPE}
        self.rope_parameters, faults = _one_rope(rope_parameters, older)
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.kv_source_layers = list(kv_source_layers or range(num_hidden_layers))
        self.kv_windowed_layers = list(kv_windowed_layers)
        self.kv_window_size = kv_window_size
        self.iter_forward_passes = iter_forward_passes
        self.iter_backward_passes = iter_backward_passes
        self.iter_stride = iter_stride
        self.iter_start = iter_start
        self.iter_project_at_use = iter_project_at_use
        self.kv_prefill = kv_prefill
        faults += [*self._faults(), *self._foreign(kwargs), *self._rope_faults()]
        _refuse(faults)
        tokens = {"tie_word_embeddings": tie_word_embeddings, "pad_token_id": pad_token_id}
        super().__init__(**tokens, **kwargs)

    def check(self) -> None:
        """Refuse what has been set since: a :class:`ValueError` with everything that is wrong."""
        _refuse([*self._faults(), *self._foreign({})])

    def rotary_llama(self) -> LlamaConfig:
        """A Llama with the same rotary embedding, as this version of transformers describes it."""
        _refuse(self._rope_faults())
        return self._rotary_llama()

    def _rotary_llama(self) -> LlamaConfig:
        rope = dict(self.rope_parameters)
        theta, name = rope.pop("rope_theta"), "original_max_position_embeddings"
        # Before transformers 5 longrope looks for it beside the other parameters.
        beside = {name: rope[name]} if rope["rope_type"] == "longrope" and name in rope else {}
        return LlamaConfig(
            hidden_size=self.num_attention_heads * self.head_dim,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=theta,
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            **beside,
        )

    def _rope_faults(self) -> list[str]:
        rope, kinds = self.rope_parameters, ("default", *ROPE_INIT_FUNCTIONS)
        if any(isinstance(value, Mapping) for value in rope.values()):
            return [
                "rope_parameters differ between kinds of layers, but all are rotated alike here"
            ]
        kind, theta = rope.get("rope_type"), rope.get("rope_theta")
        faults = [] if kind in kinds else [f"rope_type is {kind!r}, not one of {kinds}"]
        if not isinstance(theta, int | float) or theta <= 0:
            faults.append(f"rope_theta is {theta!r}, not a number above 0")
        if kind != "proportional" and rope.get("partial_rotary_factor") not in (None, 1.0):
            factor = rope["partial_rotary_factor"]
            faults.append(f"partial_rotary_factor is {factor!r}, but heads are rotated whole here")
        if faults or kind == "default":
            return faults
        try:
            llama = self._rotary_llama()
            for length in (None, 2**31):
                ROPE_INIT_FUNCTIONS[kind](llama, None, seq_len=length)
        except Exception as error:  # whatever this version of transformers finds wrong
            return [f"rope_parameters of {kind!r} are not usable: {type(error).__name__}: {error}"]
        return []

    def _foreign(self, given: Mapping[str, Any]) -> list[str]:
        """Settings that are not those built in; ``given`` ones are not attributes yet."""
        values = {name: given.get(name, getattr(self, name, None)) for name in _BUILT_IN}
        faults = [
            f"{name} is {value!r}, but this model is built with {_BUILT_IN[name]!r} only"
            for name, value in values.items()
            if value is not None and value != _BUILT_IN[name]
        ]
        if given.get("per_layer_config") or getattr(self, "is_heterogeneous", False):
            faults.append("per_layer_config is given, but all layers have one shape here")
        return faults

    def _faults(self) -> list[str]:
        sources, count = self.kv_source_layers, self.num_hidden_layers
        faults = []
        if len(sources) != count:
            faults.append(f"kv_source_layers has {len(sources)} entries for {count} layers")
        faults += [
            f"layer {layer} reads layer {source}, which owns no keys and values"
            for layer, source in enumerate(sources)
            if not 0 <= source < len(sources) or sources[source] != source
        ]
        if self.kv_windowed_layers and not self.kv_window_size:
            faults.append("kv_windowed_layers needs kv_window_size")
        choices = {
            "iter_start": ("zero", "input", "self"),
            "kv_prefill": ("trained", "converged", "exact"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                faults.append(f"{name} is {getattr(self, name)!r}, not one of {allowed}")
        if self.iter_backward_passes < 1 or self.iter_forward_passes < 0 or self.iter_stride < 1:
            faults.append("iter_* needs forward passes >= 0, backward passes >= 1, stride >= 1")
        return faults

    @property
    def kv_layers(self) -> list[int]:
        """Layers that own keys and values; the ``n``-th of them uses slot ``n`` of a KV cache."""
        return [layer for layer, source in enumerate(self.kv_source_layers) if source == layer]

    @property
    def cyclic_groups(self) -> list[tuple[int, int]]:
        """``(first, last)`` of the layers that are iterated together, bottom to top."""
        groups: list[tuple[int, int]] = []
        layer, sources = 0, self.kv_source_layers
        while layer < len(sources):
            top = sources[layer]
            if top > layer:
                first = layer
                while layer <= top:
                    top = max(top, sources[layer])
                    layer += 1
                groups.append((first, top))
            else:
                layer += 1
        return groups

    @property
    def iter_passes(self) -> tuple[int, int]:
        """Sweeps without and with gradient."""
        return self.iter_forward_passes, self.iter_backward_passes
