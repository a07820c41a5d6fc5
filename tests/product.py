"""The product's model as the tests build it: for any map, with weights given by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_kvshare.config import ModelConfig, ParallelConfig
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.parameters import fill, gather_by_name, parameter_pieces
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.solver import jacobi_plan
from megatron_kvshare.spec.model_spec import ModelSpec
from tests import oracle


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A small model; `extra` holds further fields of ModelConfig."""

    hidden: int = 32
    ffn: int = 48
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 40
    window: int | None = 4
    untied: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Tiny:
        return replace(self, **changes)

    def config(self, num_layers: int) -> ModelConfig:
        settings = {
            "num_layers": num_layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "seq_length": 64,
            "make_vocab_size_divisible_by": 16,
            "untie_embeddings_and_output_weights": self.untied,
            **self.extra,
        }
        return ModelConfig(**settings)

    def spec(self, sharing: SharingMap) -> ModelSpec:
        return ModelSpec(
            model=self.config(sharing.num_layers),
            map=sharing,
            window_size=self.window,
            vocab_size=self.vocabulary,
        )

    def shape(self) -> oracle.Shape:
        config = self.config(num_layers=1)
        scaling = None
        if config.use_rope_scaling:
            scaling = oracle.RopeScaling(
                config.rope_scaling_factor,
                config.rope_low_freq_factor,
                config.rope_high_freq_factor,
                config.rope_original_max_positions,
            )
        return oracle.Shape(
            num_attention_heads=self.heads,
            num_query_groups=self.kv_heads,
            head_width=config.head_dim,
            window_size=self.window,
            norm_epsilon=config.norm_epsilon,
            rotary_base=config.rotary_base,
            rope_scaling=scaling,
        )

    def weights(self, sharing: SharingMap, seed: int = 0) -> dict[str, Tensor]:
        return oracle.random_weights(
            sharing.sources,
            self.shape(),
            hidden=self.hidden,
            ffn=self.ffn,
            vocabulary=self.vocabulary,
            tied=not self.untied,
            seed=seed,
        )

    def oracle(self, sharing: SharingMap, weights: dict[str, Tensor]) -> oracle.Oracle:
        """The naive model in fp64, so that what is compared is the product's rounding alone."""
        doubles = {name: weight.double() for name, weight in weights.items()}
        return oracle.Oracle(sharing.sources, sharing.windowed, self.shape(), doubles)

    def model(
        self,
        sharing: SharingMap,
        state: ParallelState,
        passes: tuple[int, int] = (7, 2),
        *,
        skip: bool = True,
        parallel: ParallelConfig | None = None,
    ) -> KVShareGPT:
        """The product's model, its weights not set yet."""
        plan = jacobi_plan(sharing, *passes, skip=skip)
        return KVShareGPT(self.spec(sharing), parallel or ParallelConfig(), plan, state)


def load_by_name(model: KVShareGPT, weights: dict[str, Tensor]) -> None:
    """Put full tensors into the local parameters; padding becomes zero."""
    fill(model, weights.__getitem__)
    names = {piece.name for pieces in parameter_pieces(model).values() for piece in pieces}
    assert names == set(weights), f"names differ: {names ^ set(weights)}"


def loss_and_gradients(
    model: KVShareGPT, state: ParallelState, tokens: Tensor, labels: Tensor, **where: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and the gradient of every weight by its full name, on the CPU."""
    device = state.platform.device
    there = {name: None if x is None else x.to(device) for name, x in where.items()}
    model.zero_grad(set_to_none=True)
    loss = model(tokens.to(device), labels.to(device), **there).loss / labels.numel()
    loss.backward()
    return loss.detach().cpu(), gather_by_name([model], state, "grad")


def relative_differences(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """||got - wanted|| / ||wanted|| by name.

    A gradient that is 0 but for rounding (queries that see a single key, for instance) has no scale
    of its own: its difference is taken relative to the largest gradient. What is not a number is
    infinitely far off, so that no comparison passes it by.
    """
    assert got.keys() == wanted.keys(), f"names differ: {got.keys() ^ wanted.keys()}"
    norms = {name: float(reference.double().norm()) for name, reference in wanted.items()}
    largest = max(norms.values())
    differences = {}
    for name, reference in wanted.items():
        difference = float((got[name].double() - reference.double()).norm())
        scale = norms[name] if norms[name] > 1e-9 * largest else largest
        differences[name] = difference / scale if math.isfinite(difference) else math.inf
    return differences


def assert_close_by_name(
    got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float
) -> None:
    differences = relative_differences(got, wanted)
    worst = sorted(differences.items(), key=lambda item: -item[1])[:5]
    assert worst[0][1] <= tolerance, f"relative differences, worst first: {worst}"


def random_tokens(vocabulary: int, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
