"""What a model is, apart from its weights (no torch): the common ground of training, native
checkpoints and Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from megatron_kvshare.config import ModelConfig, SharingConfig
from megatron_kvshare.config.derive import model_shape, recipe, sharing_map
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import Held, Weight, stage_weights, weights
from megatron_kvshare.rope import ROPE_SETTINGS
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.solver import RECIPES, Recipe


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """``vocab_size`` is the true size, without padding; ``window_size`` is in tokens, for the
    windowed layers of ``map``; ``tokenizer`` is the SHA-256 of its file, None if unknown."""

    model: ModelConfig
    map: SharingMap
    recipe: Recipe = RECIPES["paper"]
    window_size: int | None = None
    vocab_size: int
    tokenizer: str | None = None

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        sharing: SharingConfig,
        vocab_size: int,
        tokenizer: str | None = None,
    ) -> ModelSpec:
        """The model that the settings ask for. Raises :class:`MapError`."""
        return cls(
            model=model,
            map=sharing_map(model, sharing),
            recipe=recipe(sharing),
            window_size=sharing.window_size,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> ModelSpec:
        """The model that has this :attr:`identity`; ``settings`` say what is not part of it."""
        names = {field.name for field in fields(ModelConfig)}
        model = {name: value for name, value in {**settings, **identity}.items() if name in names}
        stored = identity["kv_recipe"]
        return cls(
            model=ModelConfig(**model),
            map=SharingMap.parse(identity["kv_map"]),
            recipe=RECIPES["paper"] if stored is None else Recipe.from_dict(stored),
            window_size=identity["window_size"],
            vocab_size=identity["vocab_size"],
            tokenizer=identity["tokenizer"],
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What weights belong to: map, how it is computed, sizes, true vocabulary, tokenizer."""
        model = self.model
        return {
            "kv_map": self.map.notation,
            "kv_recipe": self.recipe.as_dict() if self.map.is_cyclic else None,
            "window_size": self.window_size if any(self.map.windowed) else None,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.query_groups,
            "kv_channels": model.head_dim,
            "vocab_size": self.vocab_size,
            "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
            "tokenizer": self.tokenizer,
            "norm_epsilon": model.norm_epsilon,
            "rotary_base": model.rotary_base,
            **_rope_identity(model),
        }

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes that costs depend on."""
        return model_shape(self.model, self.vocab_size, self.window_size)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The table of the tensors the model consists of."""
        return weights(self.shape, self.map)

    @cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same, as shapes by name."""
        return {each.name: each.shape for each in self.weights}

    def weights_on(self, stage: Held) -> tuple[Weight, ...]:
        """The tensors that a pipeline stage holds."""
        return stage_weights(self.shape, self.map, stage)


def _rope_identity(model: ModelConfig) -> dict[str, Any]:
    """What of it weights belong to. Llama 3's has the form that it had before there were others."""
    kind = model.rope_scaling
    identity: dict[str, Any] = {"use_rope_scaling": kind == "llama3"}
    if kind is None:
        return identity
    if kind != "llama3":
        identity["rope_scaling_type"] = kind
    if kind == "dynamic":  # stretches what is longer than this
        identity["max_position_embeddings"] = model.max_positions
    return identity | {name: getattr(model, name) for name in ROPE_SETTINGS[kind]}
