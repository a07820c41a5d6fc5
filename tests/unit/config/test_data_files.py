"""Files that name data: long blends, Megatron's file per split, and stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.config.data_files import read_stages
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.spec.run_plan import RunPlan

PREFIXES = ("web", "math", "code")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token files by name only: rules look no further."""
    monkeypatch.chdir(tmp_path)
    for prefix in PREFIXES:
        for ending in (".bin", ".idx"):
            Path(prefix + ending).touch()


def check(argv: str) -> PretrainConfig:
    return parse_pretrain(["--vocab-size", "100", *argv.split()], {})


def faults(argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(argv)
    return [str(fault) for fault in caught.value.faults]


def write(name: str, content: object) -> None:
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_blend_in_a_file() -> None:
    write("blend.txt", "0.7 web\n0.3\tmath\n")
    config = check("--data-args-path blend.txt")
    assert config.data.data_path == ("0.7", "web", "0.3", "math")


@pytest.mark.parametrize(
    "content",
    [
        {"train": [0.7, "web", "0.3", "math"], "valid": ["code"], "test": "code"},
        {"train": "0.7 web 0.3 math", "valid": "code", "test": ["code"]},
    ],
)
def test_megatrons_file_per_split(content: dict) -> None:
    write("splits.json", content)
    data = check("--per-split-data-args-path splits.json").data
    assert data.train_data_path == ("0.7", "web", "0.3", "math")
    assert data.valid_data_path == data.test_data_path == ("code",)
    assert data.data_path == ()


def test_the_flags_per_split() -> None:
    words = "--train-data-path 2 web 1 math --valid-data-path code --test-data-path math"
    data = check(words).data
    assert data.train_data_path == ("2", "web", "1", "math")
    assert (data.valid_data_path, data.test_data_path) == (("code",), ("math",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "it is not JSON"),
        ("[1]", "JSON object with the keys train, valid and test"),
        ({"train": ["web"], "validation": ["code"]}, "keys train, valid and test, and no others"),
        ({"train": {"web": 1}}, "train must be a list of prefixes"),
        ({"train": [["web"]]}, "train must be a list of prefixes"),
        ({"train": [True, "web"]}, "train must be a list of prefixes"),
        ({"train": [], "valid": None}, "it names no data"),
        ({"train": [0.5, "web", "math"]}, "WEIGHT PREFIX"),
        ({"train": ["none"]}, "there is no file none.bin"),
        ({"valid": ["web"]}, "none for training"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_per_split(content: object, told: str) -> None:
    if content == "\udcff":
        Path("splits.json").write_bytes(b"\xff")
    else:
        write("splits.json", content)
    (fault,) = faults("--per-split-data-args-path splits.json")
    assert told in fault and "Fix:" in fault


def test_a_file_does_not_compete_with_flags() -> None:
    write("splits.json", {"train": ["web"]})
    write("blend.txt", "web")
    both = "--per-split-data-args-path splits.json --train-data-path math"
    assert "it excludes --train-data-path" in faults(both)[0]
    assert "it excludes --data-path" in faults("--data-args-path blend.txt --data-path math")[0]
    both = "--data-args-path blend.txt --per-split-data-args-path splits.json"
    assert "it excludes --train-data-path" in faults(both)[0]
    assert "no such file" in faults("--data-args-path none.txt")[0].lower()


def test_test_data_needs_evaluation() -> None:
    words = "--train-data-path web --test-data-path math --eval-iters 0"
    assert "--eval-iters" in faults(words)[0]
    assert "none for training" in faults("--test-data-path math")[0]
    assert "excludes" in faults("--data-path web --test-data-path math")[0]


STAGES = """
- from-step: 11
  data-path: [0.5, web, 0.5, math]
- from_tokens: 1e6
  data_path: code
"""


def test_stages() -> None:
    write("stages.yaml", STAGES)
    config = check(
        "--data-path web --data-stages stages.yaml --global-batch-size 8 --seq-length 64"
        " --num-layers 2 --train-iters 10000 --kv-layers 2"
    )
    planned = RunPlan.of(config, 1)
    first, second = planned.data_stages
    assert first.words == ("0.5", "web", "0.5", "math") and second.words == ("code",)
    assert [stage.where for stage in (first, second)] == ["stages.yaml:2", "stages.yaml:4"]
    assert (first.start, second.start) == ("from-step 11", "from-tokens 1,000,000")
    assert first.first_sample(8, 64) == 80
    assert second.first_sample(8, 64) == 1_000_000 // 64 == second.first_sample(4, 64)
    assert RunPlan.of(check("--data-path web"), 1).data_stages == ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [", "not valid YAML"),
        ("", "it must be a list of stages"),
        ("data-path: web", "it must be a list of stages"),
        ("- web", "a stage has keys"),
        ("- data-path: web", "one of from-step and from-tokens"),
        ("- {from-step: 3, from-tokens: 9, data-path: web}", "one of from-step and from-tokens"),
        ("- {from-step: 3, data-path: web, lr: 3}", "one of from-step and from-tokens"),
        ("- {from-step: 3, from_step: 4, data-path: web}", "one of from-step and from-tokens"),
        ("- {from-step: 0, data-path: web}", "a whole number above 0"),
        ("- {from-step: 2.5, data-path: web}", "a whole number above 0"),
        ("- {from-step: [2], data-path: web}", "a whole number above 0"),
        ("- {from-tokens: soon, data-path: web}", "a whole number above 0"),
        ("- {from-step: 3, data-path: []}", "a prefix, or a list of prefixes"),
        ("- {from-step: 3, data-path: {web: 1}}", "a prefix, or a list of prefixes"),
        ("- {from-step: 3, data-path: [0.5, web, math]}", "WEIGHT PREFIX"),
        ("- {from-step: 3, data-path: none}", "there is no file none.bin"),
        ("- {from-step: 1, data-path: web}", "at or before the data ahead of it"),
        (
            "- {from-step: 9, data-path: web}\n- {from-tokens: 64, data-path: math}",
            "at or before the data ahead of it (sample 64)",
        ),
    ],
)
def test_what_is_wrong_with_stages(content: str, told: str) -> None:
    write("s.yaml", content)
    flags = "--data-path web --global-batch-size 8 --seq-length 64 --data-stages s.yaml"
    (fault,) = faults(flags)
    assert told in fault and "s.yaml" in fault and "Fix:" in fault


def test_all_stages_are_judged() -> None:
    write("s.yaml", "- {from-step: x, data-path: web}\n- {from-step: 5}\n")
    found = faults("--data-path web --data-stages s.yaml --seed -1")
    assert [fault.split(" = ")[0] for fault in found] == [
        "--seed",
        "s.yaml:1: from-step",
        "s.yaml:2",
    ]


def test_made_up_tokens_have_no_stages() -> None:
    write("s.yaml", "- {from-step: 3, data-path: web}")
    assert "come from no files" in faults("--mock-data --data-stages s.yaml")[0]
    assert "come from no files" in faults("--mock-data --max-epochs 2")[0]
    assert read_stages(check("--data-path web").data) == ()
