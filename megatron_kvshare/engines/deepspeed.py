"""DeepSpeed's ZeRO over the data-parallel ranks; tensor parallelism stays megatron-core's."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_kvshare.checkpoint.load import Found, load_checkpoint, restore_generators
from megatron_kvshare.checkpoint.save import Content, content, content_beside
from megatron_kvshare.config import TrainConfig
from megatron_kvshare.data.train_data import Batch
from megatron_kvshare.engines.zero import (
    BFloat16Shares,
    FragmentShares,
    Shares,
    WeightShares,
    WholeShares,
)
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api.loss import OutputHead
from megatron_kvshare.megatron_api.optimizer import (
    build_scheduler,
    clipping_factor,
    is_counted,
    set_learning_rate,
)
from megatron_kvshare.megatron_api.parallel import ParallelState, all_reduce_
from megatron_kvshare.megatron_api.platform import Platform
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.pipeline.chunk import StageChunk
from megatron_kvshare.pipeline.runner import Pass, Sums, counted_tokens
from megatron_kvshare.spec.run_plan import RunPlan


class DeepSpeedEngine:
    """An :class:`~megatron_kvshare.engines.engine.Engine`; ``stages``: the whole model, with its
    first weights."""

    def __init__(
        self, planned: RunPlan, stages: Sequence[KVShareGPT], state: ParallelState
    ) -> None:
        (stage,) = stages
        assert planned.deepspeed is not None
        train = planned.config.train
        self.stages = stages
        self.weights = list(stage.parameters())
        sum_over_sequence_ranks(self.weights, state)
        adamw = build_adamw(self.weights, train)
        self._deepspeed = imported_deepspeed(state.platform)
        from megatron_kvshare.engines import deepspeed_files  # imports DeepSpeed

        model = Trained(stage)
        self.engine, zero, _, _ = self._deepspeed.initialize(
            model=model,
            optimizer=adamw,
            mpu=Ranks(state),
            config=planned.deepspeed,
            dist_init_required=False if self._deepspeed.comm.is_initialized() else None,
        )
        self._stage = int(self.engine.zero_optimization_stage())
        if self._stage == 3:
            model.release = zero.parameter_offload.post_sub_module_backward_function
        self._files = self.engine.checkpoint_engine = deepspeed_files.DataFiles()
        self._client_state = deepspeed_files.client_state(stage)
        self.shares = shares_of(self.engine, zero, adamw, self.weights)
        self.scheduler = build_scheduler(adamw, train)
        self.chunk = StageChunk(self.engine, None, None)
        self._num_microbatches = planned.batch.num_microbatches
        self._clip_grad = train.clip_grad
        self._state = state
        self._has_gradients = False

    def forward_backward(self, batches: Iterator[Batch], how: Pass) -> Sums:
        self._skip_unused_gradients()
        read = list(islice(batches, self._num_microbatches))
        scale = self._loss_scale(read)
        sums = []
        for number, batch in enumerate(read, 1):
            with calls_at_rest():
                output = self.chunk(batch, how)
                self.engine.backward(output.tensor * scale, scale_wrt_gas=False)
            if number < len(read):
                self.engine.step()  # DeepSpeed counts microbatches so; the last one's is the update
            sums.append(output.sums)
        self._has_gradients = True
        return Sums.stack(sums).over_ranks(self._state)

    def _loss_scale(self, batches: Sequence[Batch]) -> torch.Tensor:
        """What makes DeepSpeed's mean over ranks of the summed losses that per token of the global
        batch, however the tokens that count are spread over ranks and microbatches."""
        counted = torch.stack([counted_tokens(batch).sum() for batch in batches]).sum()
        return self._state.dp_size / all_reduce_(counted, self._state.dp_group).clamp(min=1)

    def _skip_unused_gradients(self) -> None:
        """Of a step that was to change nothing."""
        if not self._has_gradients:
            return
        self.shares.discard_gradients()
        self.engine.micro_steps += 1
        self.engine.global_steps += 1
        self.engine.skipped_steps += 1
        self._has_gradients = False

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], how: Pass, global_batches: int) -> Sums:
        count, how = global_batches * self._num_microbatches, how._replace(forward_only=True)
        sums = [self.chunk(batch, how).sums for batch in islice(batches, count)]
        return Sums.stack(sums).over_ranks(self._state)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # ZeRO 3 gathers weights module by module here too

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        gathered: contextlib.AbstractContextManager[None]
        gathered = self._deepspeed.zero.GatheredParameters(self.weights)
        return gathered

    def set_learning_rate(self, step: int) -> float:
        return set_learning_rate(self.scheduler, step)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        counted = (weight for weight in self.weights if is_counted(weight, self._state.tp_group))
        gradients = [each for each in map(self.shares.gradient, counted) if each is not None]
        square = torch.zeros((), dtype=torch.float32, device=self._state.platform.device)
        if gradients:
            norms = torch._foreach_norm([each.float() for each in gradients])
            square += torch.linalg.vector_norm(torch.stack(norms)).square()
        all_reduce_(square, self._state.tp_group)
        if self.shares.divided:
            all_reduce_(square, self._state.dp_group)
        return float(square.sqrt())

    @torch.no_grad()
    def update(self, grad_norm: float) -> None:
        factor = clipping_factor(self._clip_grad, grad_norm)
        if factor != 1.0:
            gradients = map(self.shares.gradient, self.weights)
            torch._foreach_mul_([each for each in gradients if each is not None], factor)
        self.engine.step()
        self._has_gradients = False

    @contextlib.contextmanager
    def state_shards(self, with_optimizer: bool) -> Iterator[Content]:
        self._skip_unused_gradients()
        if with_optimizer:
            yield content_beside(self._write, self.shares, self._state)
        else:  # DeepSpeed writes no weights alone
            with self.whole_weights():
                yield content(self.stages, None, self._state)

    def _write(self, folder: Path) -> None:
        """DeepSpeed's own files into ``folder``, and its converter beside it."""
        self.engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state=self._client_state,
            save_latest=False,
        )
        self._files.require_success(self._state)

    def load(self, found: Found) -> None:
        """By DeepSpeed from what it wrote on as many ranks at the same stage; else by name."""
        if not self._has_same_shards(found):
            self._load_by_name(found)
            return
        path, _ = self.engine.load_checkpoint(
            str(found.folder.parent), tag=found.folder.name, load_lr_scheduler_states=False
        )
        assert path is not None, "its files have been checked"
        restore_generators(found, self._state)

    def _has_same_shards(self, found: Found) -> bool:
        manifest, state = found.manifest, self._state
        stored = (manifest.tensor_parallel, manifest.data_parallel)
        settings = {"zero_stage": self._stage, "bf16": self.weights[0].dtype == torch.bfloat16}
        return (
            manifest.layout == "deepspeed"
            and found.take_optimizer
            and stored == (state.tp_size, state.dp_size)
            and all(manifest.config.get(name) == each for name, each in settings.items())
        )

    def _load_by_name(self, found: Found) -> None:
        with self._deepspeed.zero.GatheredParameters(self.weights, modifier_rank=0):
            load_checkpoint(found, self.stages, self.shares, self._state)
            if self.weights[0].dtype == torch.float32:
                self.shares.follow_weights()  # the fp32 weights of the checkpoint are these


class Trained(nn.Module):
    """What DeepSpeed sees of the model: the modules with weights, by their full names, so that the
    weights keep theirs, and one forward.

    Under ZeRO 3 its hooks gather weights for the calls of modules, and learn from the tensors that
    go in and out when backward needs them again. Into and out of these go tensors only. Whole
    layers would mislead them: keys and values cross layers inside of objects, and parts of a layer
    run alone.
    """

    def __init__(self, stage: KVShareGPT) -> None:
        super().__init__()
        for name, module in stage.named_modules():
            holds_weights = next(module.parameters(recurse=False), None) is not None
            if holds_weights or isinstance(module, OutputHead):  # a tied one uses the embedding's
                self._modules[name] = module
                module.post_bwd_fn = Uses(module, self)  # in the place of DeepSpeed's
        self._run, self._load = stage.__call__, stage.load_state_dict  # the model is no child
        self.release: Callable[[nn.Module], None] | None = None

    def forward(self, *batch: Any, **how: Any) -> Any:
        return self._run(*batch, **how)

    def load_state_dict(self, *state: Any, **how: Any) -> Any:
        """torch takes names apart at their dots; here a module has several in its name."""
        return self._load(*state, **how)


class Use:
    """One call of a module, until backward has been through it: ``inputs`` whose gradients are to
    come."""

    def __init__(self, module: nn.Module, model: Trained) -> None:
        self.module, self.model = module, model
        self.inputs = 0

    def has_gradient(self) -> None:
        """Of one more input."""
        self.inputs -= 1
        if self.inputs == 0:
            assert self.model.release is not None
            self.model.release(self.module)


class Uses:
    """By whose ``apply`` DeepSpeed's ZeRO 3 passes every tensor that enters a module, to release
    the weights when backward has come out of it.

    Its own counts tensors for the last call only: a module that runs several times would keep its
    weights from the second backward through it on.
    """

    def __init__(self, module: nn.Module, model: Trained) -> None:
        self._module, self._model = module, model

    def apply(self, entering: torch.Tensor) -> torch.Tensor:
        if not (entering.requires_grad and torch.is_grad_enabled()):
            return entering
        if self._module.ds_grads_remaining == 0:  # which DeepSpeed sets where a call begins
            self._use = Use(self._module, self._model)
        self._module.ds_grads_remaining += 1
        self._use.inputs += 1
        through: torch.Tensor = _Through.apply(entering, self._use)
        return through


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entering: torch.Tensor, use: Use) -> torch.Tensor:
        ctx.use = use
        return entering.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.use.has_gradient()
        return gradient, None


@contextlib.contextmanager
def calls_at_rest() -> Iterator[None]:
    """Forget calls of modules that have not come to their end: torch breaks off what it runs again
    in backward as soon as it has what it needs, and ZeRO 3 would keep their list for ever."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    before = len(FWD_MODULE_STACK)
    yield
    del FWD_MODULE_STACK[before:]


class Ranks:
    """The process groups by the names that DeepSpeed asks an ``mpu`` for.

    ``parallel_state`` lacks some of them. What it has of sequence parallelism means another one
    there, by which DeepSpeed would take tensor-parallel ranks for data-parallel ones.
    """

    def __init__(self, state: ParallelState) -> None:
        self._state = state

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._state.dp_group

    def get_data_parallel_rank(self) -> int:
        return self._state.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._state.dp_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._state.dp_group)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._state.tp_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._state.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._state.tp_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self._state.tp_group, 0)

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def imported_deepspeed(platform: Platform) -> ModuleType:
    """DeepSpeed, for this platform, and silent.

    Raises:
        ConfigError: it is not installed.
    """
    if not platform.is_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when it is first used
    os.environ.setdefault("LOCAL_RANK", str(platform.device.index or 0))  # asked for at any time
    try:
        import deepspeed
        from deepspeed import ops
        from deepspeed.utils import logger
    except ImportError as error:
        rule = f"DeepSpeed cannot be imported here: {error}"
        fix = "pip install megatron_kvshare[deepspeed], or train with --engine megatron"
        raise ConfigError(Fault("--engine", "deepspeed", rule, fix)) from error
    for handler in logger.handlers:
        handler.setStream(sys.stderr)
    # It calls collectives by names that newer versions of torch take for old ones.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    if not platform.is_gpu:
        # Or it would run a compiler to see what it could compile, and then compile collectives
        # through shared memory.
        ops.__compatible_ops__ = {}
    return deepspeed


def build_adamw(weights: Sequence[nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """The same AdamW as megatron-core's; ``wd_mult`` is read by its learning-rate schedule."""
    groups = [
        {"params": [weight for weight in weights if weight.decays is decays], "wd_mult": multiple}
        for decays, multiple in ((True, 1.0), (False, 0.0))
    ]
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.adam_eps, fused=True)


def sum_over_sequence_ranks(weights: Sequence[nn.Parameter], state: ParallelState) -> None:
    """Weights that see part of the sequence on every tensor-parallel rank: their gradients are
    summed as autograd finds them, before ZeRO divides them over the data-parallel ranks."""
    if state.tp_size == 1:
        return
    for weight in weights:
        if getattr(weight, "sequence_parallel", False):
            weight.register_hook(partial(_summed, group=state.tp_group))


def _summed(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return all_reduce_(gradient.clone(), group)


def shares_of(
    engine: Any, zero: Any, adamw: torch.optim.AdamW, weights: Sequence[nn.Parameter]
) -> Shares:
    """``zero``: the optimizer that DeepSpeed has chosen."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    stage = int(engine.zero_optimization_stage())
    kind: type[Shares] = (WholeShares, FragmentShares, FragmentShares, WeightShares)[stage]
    if isinstance(zero, BF16_Optimizer):
        kind = BFloat16Shares
    return kind(zero, adamw, weights)
