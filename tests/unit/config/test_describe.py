"""What a dry run prints about the configuration."""

from __future__ import annotations

from megatron_kvshare.config import ModelConfig, PretrainConfig, TrainConfig
from megatron_kvshare.config.flags.describe import as_dict, describe


def test_changed_settings_are_listed_by_group_with_their_defaults():
    config = PretrainConfig(
        model=ModelConfig(num_layers=4), train=TrainConfig(seed=5), dry_run=True
    )
    lines = describe(config).splitlines()
    assert lines[0] == "model"
    assert any(line.split() == ["num_layers", "4", "(default", "22)"] for line in lines)
    assert any(line.split()[:2] == ["ffn_hidden_size", "5632"] for line in lines)
    assert lines.index("train") < lines.index("general")
    assert not any("hidden_size " in line and "2048" in line for line in lines)


def test_as_dict_is_flat():
    values = as_dict(PretrainConfig())
    assert values["num_layers"] == 22
    assert values["data_path"] == []
    assert values["dry_run"] is False
