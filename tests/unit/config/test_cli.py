"""Flags: how they are read, that all faults come together, and the help."""

from __future__ import annotations

from dataclasses import field

import pytest

from megatron_kvshare.config import Command, ModelConfig, PretrainConfig, parse
from megatron_kvshare.config.fields.types import SCHEMA, Count, NonNegative, dataclass
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.errors import ConfigError, Fault


@rule("workers low")
def _few_workers(config):
    if config.workers > 8:
        yield Fault("--workers", config.workers, "too many", "use --workers 8")


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class Small:
    """A command of its own."""

    input: tuple[str, ...]
    """Files to read."""
    workers: Count = 1
    """Processes."""
    low: float = 0.0
    """Any number."""
    scale: NonNegative | None = None
    """Optional."""
    append_eod: bool = False
    """A switch."""
    resume: bool = True
    """A switch that is on."""
    model: ModelConfig = field(default_factory=ModelConfig)


COMMAND = Command(
    prog="kvshare small", description="Does little.", examples="small -x", rules=(_few_workers,)
)


def small(*argv: str) -> Small:
    return parse(Small, argv, COMMAND)


def faults(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        small(*argv)
    return [str(fault) for fault in caught.value.faults]


def test_values_lists_switches_and_groups():
    config = small(
        "--input", "a", "b", "--workers=3", "--append-eod", "--no-resume", "--num-layers", "5"
    )
    assert config.input == ("a", "b")
    assert (config.workers, config.append_eod, config.resume) == (3, True, False)
    assert config.model.num_layers == 5
    assert (small("--input", "a").resume, small("--input", "a").scale) == (True, None)


@pytest.mark.parametrize(
    ("text", "value"), [("-1", -1.0), ("-1e-3", -1e-3), ("1e-4", 1e-4), ("-.5", -0.5), ("2E3", 2e3)]
)
def test_negative_and_scientific_numbers(text, value):
    assert small("--input", "a", "--low", text).low == value
    assert small("--input", "a", f"--low={text}").low == value


def test_the_last_of_repeated_flags_wins():
    assert small("--input", "a", "--workers", "2", "--workers", "3").workers == 3


def test_abbreviations_are_unknown_and_get_the_nearest_name():
    (fault,) = faults("--input", "a", "--worker", "2")
    assert "--worker = '2': there is no such flag" in fault
    assert "did you mean --workers?" in fault
    (fault,) = faults("--input", "a", "--zzz")
    assert "all flags: kvshare small --help" in fault


def test_required_setting():
    assert faults() == ["--input = None: it is required. Fix: write --input TEXT [TEXT ...]."]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--workers"], "it needs a value"),
        (["--input"], "it needs a value"),
        (["--workers", "1", "2"], "it takes one value, not 2"),
        (["--append-eod", "yes"], "it is a switch and takes no value"),
        (["--no-resume=1"], "it is a switch and takes no value"),
        (["--workers", "1.5"], "it must be a whole number from 1 to 2147483647"),
        (["--workers", "0"], "it must be a whole number from 1 to 2147483647"),
        (["--workers", ""], "it must be a whole number from 1 to 2147483647"),
        (["--scale", "-1"], "it must be a number of at least 0"),
        (["--scale", "nan"], "it must be a number of at least 0"),
        (["--transformer-impl", "locale"], "Fix: write for example --transformer-impl local"),
        (["--config"], "it takes one file"),
        (["--config", "no/such.yaml"], "the file cannot be read"),
    ],
)
def test_wrong_values(argv, part):
    assert part in "\n".join(faults("--input", "a", *argv))


def test_a_value_before_any_flag():
    assert "a value without a flag" in faults("stray", "--input", "a")[0]


def test_all_kinds_of_faults_come_together():
    found = faults("--input", "a", "--workerz", "2", "--num-layers", "x", "--workers", "99")
    assert len(found) == 3
    assert [fault.split(" = ")[0] for fault in found] == ["--workerz", "--num-layers", "--workers"]


def test_a_rule_is_not_judged_on_a_faulty_setting():
    assert len(faults("--input", "a", "--workers", "99", "--low", "x")) == 1


def test_no_rule_is_judged_when_the_file_cannot_be_read(tmp_path):
    assert len(faults("--input", "a", "--workers", "99", "--config", str(tmp_path))) == 1


def test_help_shows_everything_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as caught:
        small("--workers", "wrong", "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "usage: kvshare small",
        "Does little.",
        "--workers N",
        "(default: 1)",
        "(required)",
    ):
        assert part in text
    assert "--resume, --no-resume" in text
    assert "Model: a Llama-shaped decoder" in text
    assert "{local,transformer_engine}" in text


def test_pretrain_config_parses_without_arguments():
    assert parse(PretrainConfig, [], Command(prog="kvshare pretrain")) == PretrainConfig()
