"""DeepSpeed's file and the settings agreed with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from megatron_kvshare.config.deepspeed.check import Checked, check, shown
from megatron_kvshare.config.deepspeed.file import read_file
from megatron_kvshare.config.deepspeed.keys import AUTO
from megatron_kvshare.config.deepspeed.said import ACCUMULATION, RATIO, Said, close, said
from megatron_kvshare.config.fields.pretrain import PretrainConfig
from megatron_kvshare.config.flags.settings import Setting, flag_of, settings_of
from megatron_kvshare.errors import ConfigError, Fault

_BATCH, _MICRO = "train_batch_size", "train_micro_batch_size_per_gpu"


@dataclass(frozen=True)
class Agreement:
    """``config``: the settings, completed by the file; ``checked``: what the file hands on."""

    config: PretrainConfig
    checked: Checked
    faults: tuple[Fault, ...] = ()
    warnings: tuple[str, ...] = ()


def agree(
    config: PretrainConfig, given: Mapping[str, str], world_size: int | None = None
) -> Agreement:
    """Complete the settings by what the file says, where nobody has given them.

    Args:
        config: of a run that DeepSpeed trains.
        given: settings by name that are not left at their defaults, and where they are given.
        world_size: number of processes; None where it is not known, or wrong.
    """
    path = config.deepspeed.deepspeed_config
    try:
        content = {} if path is None else read_file(path)
    except ConfigError as error:
        return Agreement(config, Checked(path or ""), error.faults)
    checked = check(path or "", content, _stage(config, content))
    settling = _Settling(config, given, checked)
    for each in said(checked):
        settling.take(each)
    settling.batch(world_size)
    settling.switches()
    faults = (*checked.faults, *settling.faults, *_impossible(settling.config, checked))
    return Agreement(settling.config, checked, faults, tuple(_warnings(settling.config, checked)))


def all_given() -> dict[str, str]:
    """All settings by name, and their flags; but for the name of the engine, which is left open
    where another flag says it."""
    settings = settings_of(PretrainConfig)
    return {each.name: each.flag for each in settings if each.name != "engine"}


def _stage(config: PretrainConfig, content: Mapping[str, Any]) -> int | None:
    """Of ZeRO, as the file says or else the flag; None where it says what is no stage."""
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", AUTO) if isinstance(zero, dict) else None
    if stage == AUTO:
        stage = config.deepspeed.zero_stage or 0
    return stage if stage in (0, 1, 2, 3) and not isinstance(stage, bool) else None


class _Settling:
    """The settings on their way."""

    def __init__(self, config: PretrainConfig, given: Mapping[str, str], checked: Checked) -> None:
        self.config, self.checked = config, checked
        self.faults: list[Fault] = []
        self._given = dict(given)
        self._settings = {each.name: each for each in settings_of(PretrainConfig)}

    def take(self, each: Said) -> None:
        """Set what is left open; what is given must be the same."""
        if each.key == RATIO:
            each = each._replace(value=each.value * self.config.train.lr)
        name, current = each.name, self._value(each.name)
        train = self.config.train
        if name == "lr_warmup_iters" and train.lr_warmup_fraction is not None:
            name, current = "lr_warmup_fraction", train.warmup_iters
        if name not in self._given or current is None:
            self._set(each.name, each.value, each.key, each.written)
        elif not close(current, each.value):
            rule = f"{self.checked.where(each.key)} is {each.written!r}"
            self._fault(
                self._given[name], self._value(name), rule, "give one of them, or the same in both"
            )

    def batch(self, world_size: int | None) -> None:
        """Of global batch, micro-batch and accumulation, two say the third."""
        size = self.config.parallel.model_parallel_size
        if world_size is None or world_size % size:
            return
        replicas, train = world_size // size, self.config.train
        said, given = self.checked.agreed, self._given
        steps = said.get(ACCUMULATION, AUTO)
        batch = train.global_batch_size if "global_batch_size" in given else None
        # "auto" is the flag's value, its default too.
        named = "micro_batch_size" in given or _MICRO in said
        micro = train.micro_batch_size if named else None
        if steps == AUTO:
            if batch is None or all(said.get(key, AUTO) == AUTO for key in (_BATCH, _MICRO)):
                return
            # The batch alone: DeepSpeed does not accumulate then.
            steps = 1 if micro is None else max(batch // (micro * replicas), 1)
        if micro is None and batch is not None:
            micro = max(batch // (steps * replicas), 1)
            self._set("micro_batch_size", micro, _BATCH, batch)
        micro = micro or train.micro_batch_size
        product = micro * steps * replicas
        if batch is None:
            self._set("global_batch_size", product, ACCUMULATION, steps)
        elif batch != product:
            self._unequal(batch, micro, steps, replicas)

    def switches(self) -> None:
        """Flags that say the same as another."""
        settings = self.config.deepspeed
        if settings.deepspeed:
            self._imply("--deepspeed", "engine", "deepspeed")
        if settings.deepspeed_activation_checkpointing:
            self._imply("--deepspeed-activation-checkpointing", "recompute_granularity", "full")

    def _imply(self, flag: str, name: str, value: str) -> None:
        current = self._value(name)
        if current == value:
            return
        if name in self._given and current is not None:
            rule = f"it says {flag_of(name)} {value}, and {self._given[name]} is {current}"
            self._fault(flag, "given", rule, "give one of them")
        else:
            self._set(name, value, flag, "given")

    def _unequal(self, batch: int, micro: int, steps: int, replicas: int) -> None:
        product = micro * steps * replicas
        rule = (
            f"it must be a micro-batch of {micro} x {steps} steps of accumulation x {replicas}"
            f" data-parallel replicas = {product}"
        )
        fix = f"write {product}, or leave one of the three out"
        if self.config.dry_run and batch % (micro * steps) == 0:
            size = batch // (micro * steps) * self.config.parallel.model_parallel_size
            fix += f"; WORLD_SIZE={size} before the command plans for {size} processes"
        self._fault(self._given["global_batch_size"], batch, rule, fix)
        # Told once: rules of the batch find nothing more to say.
        train = replace(self.config.train, global_batch_size=None)
        self.config = replace(self.config, train=train)

    def _value(self, name: str) -> Any:
        return getattr(getattr(self.config, self._settings[name].group), name)

    def _set(self, name: str, value: Any, key: str, written: Any) -> None:
        setting = self._settings[name]
        group = getattr(self.config, setting.group)
        try:
            changed = replace(group, **{name: value})
        except ValidationError:
            rule, fix = f"it must be {setting.must_be}", _example(setting, key)
            self._fault(self.checked.where(key), shown(written), rule, fix)
            return
        self.config = replace(self.config, **{setting.group: changed})
        self._given[name] = key if key.startswith("--") else self.checked.where(key)

    def _fault(self, where: str, value: Any, rule: str, fix: str) -> None:
        self.faults.append(Fault(where, value, rule, fix))


def _example(setting: Setting, key: str) -> str:
    return f"write another {key.rpartition('.')[2]}, or leave it out and use {setting.example}"


def _impossible(config: PretrainConfig, checked: Checked) -> Iterator[Fault]:
    """What each part allows, and DeepSpeed not together."""
    stage, dtype = config.deepspeed.zero_stage or 0, "data_types.grad_accum_dtype"
    accumulated = checked.passed.get(dtype, "fp32")
    if config.model.bf16 and stage == 0:
        rule = "without ZeRO DeepSpeed adds up the gradients of bf16 weights in bf16"
        yield Fault("--zero-stage", stage, rule, "use --zero-stage 1, which costs no more memory")
    if not config.model.bf16 and accumulated == "bf16":
        rule = "gradients of fp32 weights are fp32"
        yield Fault(checked.where(dtype), accumulated, rule, "remove it, or train with --bf16")
    if config.deepspeed.zero_offload is not None and stage == 0:
        rule = "without ZeRO nothing is offloaded"
        yield Fault("--zero-offload", config.deepspeed.zero_offload, rule, "add --zero-stage 1")


def _warnings(config: PretrainConfig, checked: Checked) -> Iterator[str]:
    """What is done otherwise than DeepSpeed would by itself."""
    kind = "scheduler.params.warmup_type"
    if "scheduler.type" in checked.keys and kind not in checked.keys and config.train.warmup_iters:
        yield (
            f"{checked.where('scheduler')} has no warmup_type: warm-up is linear, where DeepSpeed's"
            ' own would be logarithmic; write "warmup_type": "linear"'
        )
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if checked.agreed.get(gather) is True:
        yield (
            f"{checked.where(gather)} has no effect: `kvshare convert to-hf` writes the whole model"
            " from a checkpoint"
        )
