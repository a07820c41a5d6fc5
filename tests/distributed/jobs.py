"""What workers do in the parallel suite: train for real, and report by canonical name.

Everything goes through the product's own path: configuration, `prepare`, data, schedule, optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from megatron_kvshare.config import (
    DataConfig,
    DeepSpeedConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    SharingConfig,
    TrainConfig,
)
from megatron_kvshare.megatron_api import loss
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.attention import SharedKVAttention
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.kv import KV, KVBlocks
from megatron_kvshare.model.parameters import gather_by_name
from megatron_kvshare.pipeline.payload import PayloadFormat
from megatron_kvshare.pipeline.transport import Transport
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.stages.messages import Message
from megatron_kvshare.train import evaluation
from megatron_kvshare.train.evaluation import Evaluation
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.step import train_step
from tests.distributed.world import Layout


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run; `model`, `sharing`, ... hold further settings of these sections."""

    sharing: dict[str, Any]
    kv_heads: int = 4
    steps: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def config(self, layout: Layout) -> PretrainConfig:
        sharing = {
            "window_size": 5,
            **self.sharing,
        }
        if "kv_recipe" not in sharing:
            sharing = {"kv_forward_sweeps": 1, "kv_backward_sweeps": 2, **sharing}
        model = {
            "num_layers": 8,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 8,
            "num_query_groups": self.kv_heads,
            "seq_length": 16,
            "vocab_size": 101,
            "make_vocab_size_divisible_by": 16,
            **self.model,
        }
        train = {
            "micro_batch_size": 4 // layout.data,
            "global_batch_size": 4,
            "train_iters": 10,
            "lr": 1e-3,
            "clip_grad": 0.0,
            "eval_iters": 0,
            **self.train,
        }
        return PretrainConfig(
            model=ModelConfig(**model),
            sharing=SharingConfig(**sharing),
            parallel=ParallelConfig(
                tensor_model_parallel_size=layout.tensor,
                sequence_parallel=layout.sequence_parallel,
                pipeline_model_parallel_size=layout.pipeline,
                num_layers_per_virtual_pipeline_stage=_virtual_layers(model, layout),
                **self.parallel,
            ),
            data=DataConfig(mock_data=True, **self.data),
            train=TrainConfig(**train),
            deepspeed=DeepSpeedConfig(**self.deepspeed),
            log=LogConfig(),
        )

    def planned(self, layout: Layout) -> RunPlan:
        return RunPlan.of(self.config(layout), layout.world_size)


def _virtual_layers(model: dict[str, Any], layout: Layout) -> int | None:
    if layout.virtual == 1:
        return None
    return model["num_layers"] // layout.pipeline // layout.virtual


class Trained(NamedTuple):
    """Full tensors by canonical name; gradients are those of the first step."""

    losses: list[float]
    initial_weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


def train(state: ParallelState, layout: Layout, case: Case) -> Trained:
    """Run the case's optimizer steps."""
    run = prepare(case.planned(layout), state)
    initial_weights = gather_by_name(stages(run), state, "weight")
    batches = run.data.train_batches(0)
    losses = [train_step(run, batches, 1).loss]
    gradients = finished_gradients(run)
    losses += [train_step(run, batches, number).loss for number in range(2, case.steps + 1)]
    return Trained(losses, initial_weights, gradients)


def train_in_chunks(state: ParallelState, layout: Layout, case: Case, logits: int) -> Trained:
    """The same run, whose loss sees no more than so many logits of a rank at a time."""
    with mock.patch.object(loss, "logits_per_chunk", lambda device: logits):
        return train(state, layout, case)


def finished_gradients(run: Run) -> dict[str, Tensor]:
    """Gradients of the global batch; the distributed optimizer leaves each rank a part of them."""
    for model in run.engine.models:
        model.finish_gradients()
    if run.config.parallel.use_distributed_optimizer:
        buckets = [
            bucket
            for model in run.engine.models
            for buffer in model.buffers
            for bucket in buffer.buckets
        ]
        for bucket in buckets:
            parts = list(bucket.grad_data.chunk(run.state.dp_size))
            mine = parts[run.state.dp_rank].clone()
            dist.all_gather(parts, mine, group=run.state.dp_group)
    return {
        name: gradient.clone()
        for name, gradient in gather_by_name(stages(run), run.state, "grad").items()
    }


def stages(run: Run) -> Sequence[KVShareGPT]:
    return run.engine.stages


def train_without_one_consumer(
    state: ParallelState, layout: Layout, case: Case, consumer: int
) -> Trained:
    """The same run with the keys and values that layer `consumer` reads cut off from their
    producer.

    The loss stays what it was; only the producer's gradient misses this consumer's share.
    """
    plain = SharedKVAttention.forward
    SharedKVAttention.forward = without_gradient(plain, consumer)
    try:
        return train(state, layout, case)
    finally:
        SharedKVAttention.forward = plain


def without_gradient(forward: Callable, consumer: int) -> Callable:
    def cut(self, x, view):
        if self.layer != consumer:
            return forward(self, x, view)
        producer = view.context.spec.map.sources[consumer]
        parts = (
            block and KV(*(part.detach() for part in block))
            for block in view.blocks(producer).blocks
        )
        attended, _ = forward(self, x, view.reading(producer, KVBlocks(tuple(parts))))
        return attended, view

    return cut


def evaluate(state: ParallelState, layout: Layout, case: Case) -> Evaluation:
    """Validation loss, its gap to exact and the residuals of freshly initialised weights."""
    return evaluation.evaluate(prepare(case.planned(layout), state))


def payload_bytes(state: ParallelState, layout: Layout, case: Case) -> dict[int, int]:
    """Bytes that every stage of this rank sends forward in one microbatch, as they are sent."""
    run = prepare(case.planned(layout), state)
    sent: dict[int, int] = {}
    plain_pack, plain_send = PayloadFormat.pack, Transport.send
    chunks = getattr(run.engine.runner, "chunks", ())
    above = {id(chunk.leaving): chunk.module.module.stage.number for chunk in chunks}

    def pack(self: PayloadFormat, *arguments: Any) -> Tensor:
        payload = plain_pack(self, *arguments)
        sent[above[id(self)]] = payload.numel() * payload.element_size()
        return payload

    def send(self: Transport, message: Message, flat: Tensor) -> None:
        number = self.plan.graph.tasks[message.maker].stage.number
        if message.forward and message.microbatch == 0:
            sent[number] = sent.get(number, 0) + flat.numel() * flat.element_size()
        plain_send(self, message, flat)

    PayloadFormat.pack, Transport.send = pack, send
    try:
        train_step(run, run.data.train_batches(0), 1)
    finally:
        PayloadFormat.pack, Transport.send = plain_pack, plain_send
    return sent


def parameter_sizes(
    state: ParallelState, layout: Layout, case: Case
) -> dict[int, dict[str, tuple[int, ...]]]:
    """By the number of every stage of this rank: the shapes of its parameters."""
    return {
        model.stage.number: {name: tuple(x.shape) for name, x in model.named_parameters()}
        for model in stages(prepare(case.planned(layout), state))
    }
