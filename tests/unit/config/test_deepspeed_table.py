"""The table of DeepSpeed's keys is that of the installed DeepSpeed, and what we tell it is what it
reads."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_kvshare.config.deepspeed import deepspeed_json
from megatron_kvshare.config.deepspeed.keys import Off, Passed, Section, Typed
from megatron_kvshare.config.deepspeed.table import TOP, ZERO
from megatron_kvshare.config.pretrain import parse_pretrain

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


class Asked(dict[str, Any]):
    """A configuration that notes the keys it is asked for; copies note them in the same place."""

    def __init__(self, content: dict[str, Any], keys: set[str]) -> None:
        super().__init__(content)
        self.names = keys

    def __copy__(self) -> Asked:
        return Asked(dict(self), self.names)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return Keys(self)


class Keys:
    """Of ``key in configuration.keys()``."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __contains__(self, key: object) -> bool:
        return key in self.asked


def names(model: type) -> set[str]:
    """The keys of a section: by its alias where a field has one."""
    return {field.alias or name for name, field in model.model_fields.items()}


def test_no_key_at_the_top_is_missing():
    from deepspeed.runtime.config import DeepSpeedConfig

    keys: set[str] = set()
    DeepSpeedConfig(Asked({"train_batch_size": 1}, keys))
    # It asks for sequence_parallel_size only once processes are counted.
    assert {*keys, "sequence_parallel_size", "allgather_size"} == TOP.keys.keys()


def test_no_key_of_zero_is_missing():
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert ZERO.keys.keys() == names(DeepSpeedZeroConfig) | _REMOVED_ZERO_CONFIG_KEYS.keys()
    aliases = {
        name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias
    }
    assert ZERO.aliases == aliases


def test_what_is_written_out_is_deepspeeds_default():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig().model_dump(by_alias=True)
    ours = {
        name: entry.default
        for name, entry in ZERO.keys.items()
        if isinstance(entry, Passed) and entry.default is not None
    }
    assert ours == {name: theirs[name] for name in ours}


def test_no_key_of_a_section_is_missing():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "hybrid_engine": HybridEngineConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    assert {path: keys_of(path) for path in models} == {
        path: names(model) for path, model in models.items()
    }
    assert keys_of("activation_checkpointing") == set(ACT_CHKPT_DEFAULT)


def test_every_schedule_that_is_taken_is_theirs():
    import inspect

    from deepspeed.runtime import lr_schedules

    entry = TOP.keys["scheduler"]
    assert isinstance(entry, Typed)
    for name, section in entry.types.items():
        parameters = set(inspect.signature(getattr(lr_schedules, name)).parameters)
        assert section.keys.keys() == parameters - {"optimizer"}


def keys_of(path: str) -> set[str]:
    entry: Any = TOP
    for name in path.split("."):
        entry = entry.keys[name]
    assert isinstance(entry, Section | Off) and entry.keys is not None
    return set(entry.keys)


CPU = "--zero-offload cpu"


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, ""), (1, ""), (2, ""), (3, ""), (1, CPU), (2, CPU), (3, CPU)]
)
def test_deepspeed_reads_what_it_is_told(stage: int, offload: str, tmp_path: Path):
    """Its own reader takes every value as it was meant, and has nothing left to fill in."""
    from deepspeed.runtime.config import DeepSpeedConfig

    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7e6}} if stage else {}))
    line = f"--mock-data --vocab-size 100 --deepspeed --deepspeed_config {file} {offload}"
    config = parse_pretrain(shlex.split(f"{line} --zero-stage {stage} --global-batch-size 6"), {})
    told = deepspeed_json(config, 1)
    read = DeepSpeedConfig(told)
    batch = (read.train_batch_size, read.gradient_accumulation_steps)
    assert (*batch, read.train_micro_batch_size_per_gpu) == (6, 6, 1)
    assert read.zero_optimization_stage == stage and read.gradient_clipping == 0
    zero = read.zero_config.model_dump(by_alias=True)
    for name, value in told["zero_optimization"].items():
        section = zero[name]
        assert section == value if not isinstance(value, dict) else value.items() <= section.items()
    assert (zero["offload_optimizer"] is not None) == bool(offload)
    if stage:
        assert zero["reduce_bucket_size"] == 7_000_000
