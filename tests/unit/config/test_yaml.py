"""--config FILE.yaml: the same keys as the flags, and the flags win."""

from __future__ import annotations

import pytest

from megatron_kvshare.config import Command, PretrainConfig, parse
from megatron_kvshare.config.flags.describe import as_dict
from megatron_kvshare.config.flags.megatron_flags import MEGATRON_FLAGS
from megatron_kvshare.errors import ConfigError

COMMAND = Command(prog="kvshare pretrain", megatron=MEGATRON_FLAGS)


@pytest.fixture
def read(tmp_path):
    def parsed(text: str, *argv: str) -> PretrainConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return parse(PretrainConfig, ["--config", str(path), *argv], COMMAND)

    return parsed


@pytest.fixture
def faults(read):
    def found(text: str, *argv: str) -> str:
        with pytest.raises(ConfigError) as caught:
            read(text, *argv)
        return str(caught.value)

    return found


def test_keys_with_dash_or_underscore_and_values_of_all_kinds(read):
    config = read(
        "num-layers: 4\nhidden_size: 64\nlr: 1e-3\nbf16: true\nlog_kv_residual: false\n"
        "data_path: [0.3, first, 0.7, second]\nsave: null\nkv_map: 0_1_1_1  # not a number\n"
    )
    assert (config.model.num_layers, config.model.hidden_size) == (4, 64)
    assert (config.train.lr, config.model.bf16) == (1e-3, True)
    assert config.log.log_kv_residual is False
    assert config.data.data_path == ("0.3", "first", "0.7", "second")
    assert config.checkpoint.save is None
    assert config.sharing.kv_map == "0_1_1_1"


def test_a_map_that_looks_like_an_octal_number_stays_text(read):
    assert read("kv_map: 0_5_5_5_4_5_6_7\n").sharing.kv_map == "0_5_5_5_4_5_6_7"


def test_the_command_line_wins(read):
    config = read("num_layers: 4\nseed: 7\nbf16: true\n", "--num-layers", "8")
    assert (config.model.num_layers, config.train.seed, config.model.bf16) == (8, 7, True)


def test_one_prefix_needs_no_list_and_negative_keys_work(read):
    config = read("data_path: corpus\nno_log_kv_residual: true\n")
    assert config.data.data_path == ("corpus",)
    assert config.log.log_kv_residual is False


def test_an_empty_file_changes_nothing(read):
    assert read("# nothing\n") == PretrainConfig()


def test_megatron_keys_are_accepted_or_refused_as_flags_are(read, faults):
    assert read("swiglu: true\nnormalization: RMSNorm\nfp16: false\n") == PretrainConfig()
    message = faults("fp16: true\nnormalization: LayerNorm\n")
    assert "fp16" in message and "use --bf16" in message and "RMSNorm only" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("num_layer: 4\n", "run.yaml:1: num_layer = '4': there is no such key"),
        ("num_layer: 4\n", "did you mean num_layers?"),
        (
            "seed: 1\nnum_layers: four\n",
            "run.yaml:2: num_layers = 'four': it must be a whole number",
        ),
        ("bf16: maybe\n", "it must be true or false"),
        ("seed: 1\nseed: 2\n", "a key stands once"),
        ("model:\n  num_layers: 4\n", "settings are flat"),
        ("seed: [1, 2]\n", "it takes one value, not 2"),
        ("seed: []\n", "it needs a value"),
        ("- a\n- b\n", "must hold keys with values"),
        ("just text\n", "must hold keys with values"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object:x.y {}\n", "settings are flat"),
    ],
)
def test_faults_name_file_line_and_fix(faults, text, part):
    assert part in faults(text)


def test_faults_of_file_and_command_line_come_together(faults):
    message = faults("num_layer: 4\nlr: x\n", "--seeed", "3")
    assert "3 faults" in message


def test_what_is_written_is_read_back(read):
    import yaml

    config = read("num_layers: 4\nkv_map: 0_0_2_2\ndata_path: [a, b]\n")
    assert read(yaml.safe_dump(as_dict(config))) == config
