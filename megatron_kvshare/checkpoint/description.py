"""What a model is, apart from its weights (L4): the common ground of native checkpoints and Hugging
Face folders."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megatron_kvshare.checkpoint.manifest import Manifest, identity
from megatron_kvshare.config import ModelConfig
from megatron_kvshare.config.shape import model_shape
from megatron_kvshare.sharing.cost import ModelShape
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.solver import RECIPES, Recipe
from megatron_kvshare.sharing.weights import weight_shapes


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """``vocab_size`` is the true size; ``tokenizer`` the SHA-256 of its file, None if unknown."""

    model: ModelConfig
    map: SharingMap
    recipe: Recipe = RECIPES["paper"]
    window_size: int | None = None
    vocab_size: int
    tokenizer: str | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> ModelDescription:
        """What a checkpoint holds, from its manifest."""
        about, settings = manifest.identity, manifest.config
        names = {field.name for field in fields(ModelConfig)}
        model = {name: value for name, value in {**settings, **about}.items() if name in names}
        recipe = about["kv_recipe"]
        return cls(
            model=ModelConfig(**model),
            map=SharingMap.parse(about["kv_map"]),
            recipe=RECIPES["paper"] if recipe is None else Recipe.from_dict(recipe),
            window_size=about["window_size"],
            vocab_size=about["vocab_size"],
            tokenizer=about["tokenizer"],
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this model says it is."""
        made_for = (self.model, self.map, self.recipe, self.window_size)
        return identity(*made_for, self.vocab_size, self.tokenizer)

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.model, self.vocab_size, self.window_size)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The tensors the model consists of."""
        return weight_shapes(self.shape, self.map)
