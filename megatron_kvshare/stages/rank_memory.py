"""How the memory of a training run is shared out over pipeline ranks (no torch)."""

from __future__ import annotations

from megatron_kvshare.costs.memory import TrainingMemory
from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import parameters, stage_parameters
from megatron_kvshare.stages.placement import Placement


def on_fullest_rank(
    whole: TrainingMemory, shape: ModelShape, placement: Placement
) -> TrainingMemory:
    """Of the pipeline rank with most weights: its share of the model's, and the activations of
    its layers for as many microbatches as there are ranks, which 1F1B keeps in flight."""
    ranks = range(placement.ranks)
    of_ranks = [placement.stages_of(rank) for rank in ranks]
    weights = max(
        sum(stage_parameters(shape, placement.map, stage) for stage in stages)
        for stages in of_ranks
    )
    layers = max(sum(len(stage.layers) for stage in stages) for stages in of_ranks)
    share = weights / parameters(shape, placement.map)
    kept = layers * placement.ranks / shape.num_layers
    return TrainingMemory(
        weights=round(whole.weights * share),
        gradients=round(whole.gradients * share),
        optimizer=round(whole.optimizer * share),
        activations=round(whole.activations * kept),
        logits=whole.logits,
    )
