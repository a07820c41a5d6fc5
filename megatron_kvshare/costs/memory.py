"""How much memory one rank of a training run needs, estimated without building anything.

Weights, gradients and optimizer state are exact up to padding and the (tiny) norms; activations are
what the layers hand to backward, so the true peak is somewhat higher.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megatron_kvshare.costs.shape import ModelShape
from megatron_kvshare.costs.weights import parameters
from megatron_kvshare.sharing.plan import ExecutionPlan, StepMode

_FP32_BYTES = 4
_MAKES_KV = (StepMode.FULL, StepMode.KV_ONLY)

LOGITS_PER_CHUNK = 1 << 25
"""Logits of one rank that exist at a time on a GPU: 134 MB in fp32. Microbatches with more are cut
into chunks of tokens, see ``megatron_api/loss.py``."""


@dataclass(frozen=True, kw_only=True)
class TrainingLayout:
    """How the run is laid out, with Megatron's names."""

    micro_batch_size: int
    tensor_model_parallel_size: int = 1
    data_parallel_size: int = 1
    use_distributed_optimizer: bool = False
    sequence_parallel: bool = False
    bf16: bool = False
    recompute_full: bool = False

    @property
    def bytes_per_element(self) -> int:
        return 2 if self.bf16 else _FP32_BYTES


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def training_memory(
    shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout
) -> TrainingMemory:
    """Estimate for one rank: fp32 gradients and moments; bf16 adds an fp32 copy of the weights."""
    owned = -(-parameters(shape, plan.map) // layout.tensor_model_parallel_size)
    state = owned * _FP32_BYTES * (3 if layout.bf16 else 2)
    if layout.use_distributed_optimizer:
        state = -(-state // layout.data_parallel_size)
    return TrainingMemory(
        weights=owned * layout.bytes_per_element,
        gradients=owned * _FP32_BYTES,
        optimizer=state,
        activations=activation_bytes(shape, plan, layout),
        logits=logit_bytes(shape, layout),
    )


def activation_bytes(shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout) -> int:
    """What a microbatch keeps for backward."""
    return _of_tokens(layout, shape) * _activation_elements(shape, plan, layout)


def kv_bytes(shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout) -> int:
    """Of the activations, the keys and values that are kept for the layers that read them."""
    kept = sum(
        share
        for segment in plan.segments
        for sweep in segment.sweeps
        if sweep.gradient
        for step, share in sweep.weighted_steps
        if step.mode in _MAKES_KV and plan.map.is_producer(step.layer)
    )
    width = 2 * shape.kv_width // layout.tensor_model_parallel_size
    return round(_of_tokens(layout, shape) * kept * width)


def _of_tokens(layout: TrainingLayout, shape: ModelShape) -> int:
    """Bytes of one element of every token of a microbatch."""
    return layout.micro_batch_size * shape.seq_length * layout.bytes_per_element


def logit_bytes(shape: ModelShape, layout: TrainingLayout) -> int:
    """Of the loss: logits as computed and as softmax; in chunks also as gradient, beside the
    gradients of the whole head and of what enters it."""
    tokens, columns = (
        layout.micro_batch_size * shape.seq_length,
        shape.vocab_size // layout.tensor_model_parallel_size,
    )
    if tokens * columns <= LOGITS_PER_CHUNK:
        return tokens * columns * (layout.bytes_per_element + _FP32_BYTES)
    chunk = LOGITS_PER_CHUNK * (2 * layout.bytes_per_element + _FP32_BYTES)
    gradients = columns * _FP32_BYTES + tokens * layout.bytes_per_element
    return chunk + gradients * shape.hidden_size


def _activation_elements(shape: ModelShape, plan: ExecutionPlan, layout: TrainingLayout) -> int:
    """Elements per token kept for backward: only gradient sweeps keep any."""
    ranks = layout.tensor_model_parallel_size
    hidden = shape.hidden_size // (ranks if layout.sequence_parallel else 1)
    keys_and_values = 2 * shape.kv_width // ranks
    # Per part: what enters its norm, what leaves it, and what the part keeps in between.
    attention = 2 * hidden + 2 * shape.query_width // ranks
    mlp = 2 * hidden + 4 * shape.ffn_hidden_size // ranks  # gate, up, silu(gate), product
    kept = 0.0
    for segment in plan.segments:
        for sweep in (each for each in segment.sweeps if each.gradient):
            for step, share in sweep.weighted_steps:
                owns_kv = step.mode in _MAKES_KV and plan.map.is_producer(step.layer)
                part = keys_and_values if owns_kv else 0
                if step.mode is StepMode.KV_ONLY or layout.recompute_full:
                    part += hidden
                else:
                    part += mlp + (0 if step.mode is StepMode.NO_ATTENTION else attention)
                kept += share * part
    return round(kept) + (attention + mlp if layout.recompute_full else 0)
