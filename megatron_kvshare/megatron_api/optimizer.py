"""Data-parallel wrapper, AdamW and the learning-rate schedule of megatron-core.

The gradient is the sum over the global batch's tokens divided by their number (see
:mod:`megatron_kvshare.megatron_api.schedule`), so nothing here depends on the data-parallel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megatron_kvshare.config import ParallelConfig, TrainConfig
from megatron_kvshare.megatron_api.linear import accumulate_in_place
from megatron_kvshare.megatron_api.platform import cpu_mode

__all__ = ["MegatronOptimizer", "OptimizerParamScheduler"]


class DataParallel(DistributedDataParallel):
    """Megatron-core's wrapper. Where the optimizer's step ``scales`` gradients as it reads them,
    the division by the tokens of the global batch, which is a pass over the whole buffer, is put
    off until that step: ``put_off`` is what gradients in the buffer have to be multiplied by.
    """

    scales = False
    put_off: torch.Tensor | None = None

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Called by megatron-core once per global batch."""
        if self.scales:
            self.put_off = scaling_factor
        else:
            super().scale_gradients(scaling_factor)

    def zero_grad_buffer(self) -> None:
        super().zero_grad_buffer()
        self.put_off = None

    def finish_gradients(self) -> None:
        """Do at once what was put off, for who reads the buffer."""
        if self.put_off is not None:
            super().scale_gradients(self.put_off)
            self.put_off = None


Models = Sequence[DataParallel]
"""The pipeline stages of this rank, wrapped for data parallelism."""

_UNDECAYED = ParamKey(predicate=ParamPredicate("undecayed", lambda weight: not weight.decays))


def wrap_stages(models: Sequence[torch.nn.Module], parallel: ParallelConfig) -> Models:
    """Wrap every stage of this rank, see :func:`wrap_data_parallel`."""
    wrapped = [wrap_data_parallel(model, parallel) for model in models]
    if parallel.overlap_grad_reduce and len(wrapped) > 1:
        wrapped[0].config.no_sync_func = [model.no_sync for model in wrapped]
    return wrapped


def wrap_data_parallel(model: torch.nn.Module, parallel: ParallelConfig) -> DataParallel:
    """Wrap ``model``: gradients gather in an fp32 buffer and are summed over data parallel."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        average_in_collective=False,
    )
    model.model_type = ModelType.encoder_or_decoder  # read by the schedules
    with cpu_mode():
        wrapped = DataParallel(config=model.config, ddp_config=settings, module=model)
    if parallel.overlap_grad_reduce:
        model.config.no_sync_func = wrapped.no_sync
    embedding = model.embedding and model.embedding.weight
    accumulate_in_place(model.parameters(), embedding, parallel.overlap_grad_reduce)
    return wrapped


def build_optimizer(
    models: Models, train: TrainConfig, parallel: ParallelConfig, bf16: bool
) -> MegatronOptimizer:
    """AdamW with fp32 state; which weights are decayed the model says, by the flag ``decays`` on
    each parameter.

    With the distributed optimizer every data-parallel rank owns a part of the state. torch's fused
    kernel replaces the default one where megatron-core fell back to torch: same values to
    rounding, less time.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    with cpu_mode():
        optimizer = get_megatron_optimizer(config, list(models), {_UNDECAYED: {"wd_mult": 0.0}})
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False
        _create_state(inner)
    for model in models:
        model.scales = scale_in_step(_inner_optimizers(optimizer))
    return optimizer


def _create_state(optimizer: torch.optim.AdamW) -> None:
    """Make AdamW's state before the first step, so that it can be loaded or saved until then."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter.data),
            "exp_avg_sq": torch.zeros_like(parameter.data),
        }


def _inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.AdamW]:
    """The torch optimizers inside; Transformer Engine's and apex's are left alone."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if isinstance(part.optimizer, torch.optim.AdamW)]


@torch.no_grad()
def gradient_norm(models: Models, optimizer: MegatronOptimizer) -> float:
    """Hand the gradients to the optimizer; returns their L2 norm over all parameters and ranks."""
    with cpu_mode():
        optimizer.prepare_grads()
        return float(optimizer.get_grad_norm()) * _put_off(models)


def _put_off(models: Models) -> float:
    """What gradients have yet to be multiplied by: the same on all stages."""
    factor = models[0].put_off
    return 1.0 if factor is None else float(factor)


@torch.no_grad()
def update_parameters(
    models: Models,
    optimizer: MegatronOptimizer,
    clip_grad: float,
    grad_norm: float,
) -> None:
    """After :func:`gradient_norm`: clip to ``clip_grad`` (0: do not) and take the AdamW step.

    On a GPU the fused AdamW scales each gradient as it reads it, by what was put off too. Elsewhere
    the buffer is scaled in one go, where megatron-core without fused kernels copies every gradient.
    """
    factor = clipping_factor(clip_grad, grad_norm) * _put_off(models)
    inner = _inner_optimizers(optimizer)
    with cpu_mode():
        if factor != 1.0 and scale_in_step(inner):
            with _dividing_gradients(inner, 1 / factor):
                optimizer.step_with_ready_grads()
            return
        if factor != 1.0:
            for model in models:
                model.scale_gradients(factor)
            optimizer.prepare_grads()
        optimizer.step_with_ready_grads()


def clipping_factor(clip_grad: float, grad_norm: float) -> float:
    """What gradients of this norm are multiplied by; 1 where there is nothing to clip."""
    return clip_grad / (grad_norm + 1e-6) if 0 < clip_grad < grad_norm else 1.0


def is_counted(weight: torch.nn.Parameter, tp_group: Any) -> bool:
    """Whether the gradient norm counts ``weight`` on this tensor-parallel rank: one that they all
    hold counts once."""
    return bool(param_is_not_tensor_parallel_duplicate(weight, tp_group=tp_group))


def scale_in_step(optimizers: Sequence[torch.optim.AdamW]) -> bool:
    """Whether torch's fused AdamW takes the step, on a GPU."""
    groups = [group for each in optimizers for group in each.param_groups if group["params"]]
    return bool(groups) and all(group["params"][0].is_cuda for group in groups)


@contextlib.contextmanager
def _dividing_gradients(optimizers: Sequence[torch.optim.AdamW], scale: float) -> Iterator[None]:
    """The fused AdamW divides by ``grad_scale`` if it has one, as under torch's GradScaler."""
    for each in optimizers:
        each.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for each in optimizers:
            del each.grad_scale  # type: ignore[attr-defined]


@contextlib.contextmanager
def gathered_parameters(models: Models) -> Iterator[None]:
    """Whole weights inside, to evaluate or save: with overlap they are gathered layer by layer."""
    overlapping = [model for model in models if model.ddp_config.overlap_param_gather]
    for model in overlapping:
        model.disable_forward_pre_hook()
    try:
        yield
    finally:
        for model in overlapping:
            model.enable_forward_pre_hook()


def zero_gradients(models: Models, optimizer: MegatronOptimizer) -> None:
    """Clear the gradient buffers and the optimizer's views of them."""
    for model in models:
        model.zero_grad_buffer()
    with cpu_mode():
        optimizer.zero_grad()


def build_scheduler(
    optimizer: MegatronOptimizer | torch.optim.AdamW | SimpleNamespace, train: TrainConfig
) -> OptimizerParamScheduler:
    """Megatron-core's schedule, counted in iterations.

    Warm-up goes linearly from 0 to ``lr``; then cosine, linear, constant or WSD down to ``min_lr``
    at ``lr_decay_iters`` (default: ``train_iters``).
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_iters,
        lr_decay_steps=train.decay_iters,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=train.lr_wsd_decay_iters,
        lr_wsd_decay_style=train.lr_wsd_decay_style,
    )


def set_learning_rate(scheduler: OptimizerParamScheduler, step: int) -> float:
    """Set and return the learning rate of ``step`` (from 1).

    Step 1 trains with the first warm-up value instead of 0 and the last step with ``min_lr``; the
    rate is a function of the step alone, so a resumed run needs no schedule state.
    """
    scheduler.num_steps = step
    scheduler.step(0)
    return float(scheduler.optimizer.param_groups[0]["lr"])


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of ``step`` (from 1) under these settings, for who has no optimizer."""
    nothing = SimpleNamespace(param_groups=[{}])
    return set_learning_rate(build_scheduler(nothing, train), step)
