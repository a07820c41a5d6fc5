"""The least time that a prompt and a token can take on a machine of measured rates (no torch).

A step of decoding reads every weight once, and for every layer that attends the keys and values
that its query sees: **each reader of a shared cache reads it again**. Its products and its
attention come after one another, layer by layer, so the bound is the sum of what each takes at
least: the time of its bytes or that of its FLOPs. A prompt is bound by the FLOPs of the sweeps that
the engine runs, without the layers that it leaves to the last token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from megatron_kvshare.bench.capacity import Lengths
from megatron_kvshare.costs.weights import Component, count
from megatron_kvshare.costs.work import head_flops, plan_work, step_flops
from megatron_kvshare.serving.prefill_plan import prefill_plan
from megatron_kvshare.serving.settings import PrefillMode
from megatron_kvshare.sharing.plan import LayerStep, StepMode
from megatron_kvshare.spec.model_spec import ModelSpec


class Rates(NamedTuple):
    """What a device does at most: bytes read and FLOPs of matrix products, in a second."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """At least, for one after the other read and computed with at the same time."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


class Work(NamedTuple):
    """Bytes read and FLOPs of products with weights, and of attention."""

    weight_bytes: float
    linear_flops: float
    kv_bytes: float
    attention_flops: float

    def seconds(self, rates: Rates) -> float:
        linear = rates.seconds(self.weight_bytes, self.linear_flops)
        return linear + rates.seconds(self.kv_bytes, self.attention_flops)


def decode_work(spec: ModelSpec, lengths: Lengths, batch: int, element_bytes: int) -> Work:
    """A step of ``batch`` sequences, in the mean over the tokens that are generated."""
    shape, layers = spec.shape, range(spec.map.num_layers)
    seen = [_mean_seen(spec, layer, lengths) for layer in layers]
    linear = batch * (sum(_flops(spec, layer, StepMode.FULL) for layer in layers))
    return Work(
        weight_bytes=element_bytes * _elements_read(spec, batch),
        linear_flops=linear + batch * head_flops(shape),
        kv_bytes=batch * sum(seen) * 2 * shape.kv_width * element_bytes,
        attention_flops=batch * sum(seen) * _flops_per_pair(spec),
    )


def prefill_work(
    spec: ModelSpec, mode: PrefillMode, lengths: Lengths, batch: int, element_bytes: int
) -> Work | None:
    """All prompts of a batch; None where the number of sweeps is found while they run."""
    if mode == "exact" and spec.map.is_cyclic:
        return None
    tokens = lengths.prompt
    plan = prefill_plan(spec, mode, tokens, bf16=element_bytes == 2)
    shape = replace(spec.shape, seq_length=tokens)
    flops = sum(each.forward for each in plan_work(shape, plan.whole)) + head_flops(shape)
    for layer in range(plan.tail, spec.map.num_layers):
        given = plan.tail_kv_given and layer == plan.tail
        flops += _flops(spec, layer, StepMode.KV_GIVEN if given else StepMode.FULL)
        flops += round(_seen(spec, layer, tokens - 1) * _flops_per_pair(spec))
    return Work(element_bytes * _elements_read(spec, batch * tokens), batch * flops, 0, 0)


def _flops(spec: ModelSpec, layer: int, mode: StepMode) -> int:
    """Of the products of one token with the weights of a layer."""
    return step_flops(spec.shape, spec.map, LayerStep(layer, mode), tokens=1, pairs=0)


def _flops_per_pair(spec: ModelSpec) -> int:
    """Of a query and a key that it sees."""
    step = LayerStep(0)
    pair, none = (step_flops(spec.shape, spec.map, step, tokens=1, pairs=n) for n in (1, 0))
    return pair - none


def _elements_read(spec: ModelSpec, tokens: int) -> int:
    """Of the weights; of an embedding that is not the head too, the rows of the tokens."""
    everything = count(spec.weights)
    if spec.shape.tied_embeddings:
        return everything
    table = count(each for each in spec.weights if each.component is Component.EMBEDDING)
    return everything - table + min(table, tokens * spec.shape.hidden_size)


def _seen(spec: ModelSpec, layer: int, position: int) -> int:
    """Keys that the query of a token at ``position`` sees in ``layer``."""
    strict = spec.map.is_upward(layer)
    window = spec.window_size if spec.map.windowed[layer] else None
    oldest = 0 if window is None else max(0, position - window + 1)
    return position + (0 if strict else 1) - oldest


def _mean_seen(spec: ModelSpec, layer: int, lengths: Lengths) -> float:
    """The same over the tokens that are fed back while generating: all new ones but the last."""
    positions = range(lengths.prompt, lengths.total - 1)
    return sum(_seen(spec, layer, position) for position in positions) / len(positions)
