"""The dataclasses: easy to build in Python, safe to pass around, with derived sizes."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import megatron_kvshare
from megatron_kvshare.config import ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from megatron_kvshare.config.flags.settings import groups_of, settings_of


def test_defaults_are_the_llama_shape():
    model = PretrainConfig().model
    shape = (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads)
    assert shape == (22, 2048, 5632, 32)
    assert (model.head_dim, model.query_groups, model.max_positions) == (64, 32, 2048)


@pytest.mark.parametrize(("hidden", "ffn"), [(768, 2048), (2048, 5632), (4096, 11008), (64, 256)])
def test_feed_forward_width_follows_the_hidden_size(hidden, ffn):
    assert ModelConfig(hidden_size=hidden).ffn_hidden_size == ffn
    assert ModelConfig(hidden_size=hidden, ffn_hidden_size=96).ffn_hidden_size == 96


def test_groups_are_frozen_replaceable_hashable_and_picklable():
    model = ModelConfig(num_layers=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.num_layers = 5  # type: ignore[misc]
    assert dataclasses.replace(model, hidden_size=64).num_layers == 4
    assert hash(model) == hash(ModelConfig(num_layers=4))
    config = PretrainConfig(model=model)
    assert pickle.loads(pickle.dumps(config)) == config


def test_unknown_and_wrong_values_are_refused_in_python_too():
    with pytest.raises(ValidationError):
        ModelConfig(num_layer=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        ModelConfig(num_layers=0)


def test_vocabulary_is_padded_for_every_rank():
    model = ModelConfig(vocab_size=1000)
    assert [model.padded_vocab_size(size) for size in (1, 2, 8)] == [1024, 1024, 1024]
    assert model.padded_vocab_size(16) == 2048
    assert model.padded_vocab_size(1, vocab_size=128) == 128
    with pytest.raises(ValueError, match="not known"):
        ModelConfig().padded_vocab_size()


def test_warmup_and_model_parallel_size():
    train = TrainConfig(train_iters=500, lr_warmup_fraction=0.1)
    assert (train.decay_iters, train.warmup_iters) == (500, 50)
    assert TrainConfig(lr_warmup_iters=7).warmup_iters == 7
    assert ParallelConfig(tensor_model_parallel_size=4).model_parallel_size == 4


def test_every_setting_explains_itself_and_its_default_is_valid():
    for setting in settings_of(PretrainConfig):
        assert setting.help.endswith((".", "...")), setting.flag
        assert not setting.is_required
    for group_type in groups_of(PretrainConfig).values():
        group_type()


def test_no_setting_is_dead():
    package = Path(megatron_kvshare.__file__).parent
    schema = {package / "config" / f"{name}.py" for name in ("model", "data", "training", "schema")}
    sources = [path.read_text("utf-8") for path in package.rglob("*.py") if path not in schema]
    # `group.name` in code, or "name" where settings are visited by name.
    text = "\n".join([*sources, inspect.getsource(ModelConfig), inspect.getsource(TrainConfig)])
    names = [setting.name for setting in settings_of(PretrainConfig)]
    dead = [name for name in names if not re.search(rf"[.\"]{name}\b", text)]
    assert not dead
