"""``kvshare plan``: the JSON contract, the drawing, warnings and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.errors import EXIT_USER_ERROR
from megatron_kvshare.sharing.solver import RECIPES
from tests.unit.sharing.strategies import NINE

Capture = pytest.CaptureFixture[str]


def plan_json(capsys: Capture, *flags: str) -> dict[str, Any]:
    assert main(["plan", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_of_the_main_map(capsys: Capture) -> None:
    flags = "--num-layers 22 --kv-pattern sandwich-top --kv-layers 11 --num-query-groups 4"
    found = plan_json(capsys, *flags.split(), "--kv-recipe", "paper")
    assert sum(found["parameters_by_part"].values()) == found["parameters"]
    assert found["kv_map"] == [*range(5), *[16] * 12, *range(17, 22)]
    assert found["kv_layers"] == 11
    assert found["cyclic_groups"] == [[5, 16]]
    assert found["kv_bytes_per_token"] == 11 * 2 * 256 * 2
    assert found["train_factor"] == pytest.approx(2.818, abs=1e-3)
    assert found["prefill_factor"] == pytest.approx(5.364, abs=1e-3)
    assert 1 < found["train_flops_ratio"] < found["train_factor"]


def test_json_without_any_other_flag_is_the_standard_model(capsys: Capture) -> None:
    found = plan_json(capsys)
    assert found["kv_map"] == list(range(22))
    assert found["cyclic_groups"] == []
    assert found["train_factor"] == 1.0


@pytest.mark.parametrize("pattern", NINE)
def test_json_of_the_nine_maps(capsys: Capture, pattern: str) -> None:
    flags = ["--num-layers", "12", "--kv-pattern", pattern, "--kv-layers", "3"]
    assert plan_json(capsys, *flags)["kv_layers"] == 3


def test_number_of_passes_changes_the_factor(capsys: Capture) -> None:
    flags = ["--kv-map", "1_1", "--kv-forward-sweeps", "1", "--kv-backward-sweeps", "1"]
    found = plan_json(capsys, *flags)
    assert found["train_factor"] == pytest.approx(4 / 3)
    assert found["prefill_factor"] == 2.0


@pytest.mark.parametrize("name", RECIPES)
def test_json_of_a_recipe(capsys: Capture, name: str) -> None:
    found = plan_json(capsys, "--kv-map", "0_3_3_3", "--kv-recipe", name)
    assert found["recipe"] == RECIPES[name].as_dict()


def test_the_drawing_of_a_strided_recipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plan", "--kv-map", "0_3_3_3", "--kv-recipe", "two-sweep"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "two-sweep: strided(4; 1, 1)p",
        "4 interleaved subsets",
        "1 sweep without gradient",
    ):
        assert text in out
    for recipe in RECIPES.values():
        assert str(recipe) in out


def test_an_explicit_map_says_how_many_layers(capsys: Capture) -> None:
    found = plan_json(capsys, "--kv-map", "0_5_5_5_4_5_6_7")
    assert found["num_layers"] == 8
    assert found["cyclic_groups"] == [[1, 5]]
    assert found["notation"] == "0_5_5_5_4_5_6_7"


def test_a_contradicting_number_of_layers_is_refused(capsys: Capture) -> None:
    assert main(["plan", "--kv-map", "0_1", "--num-layers", "3"]) == EXIT_USER_ERROR
    assert "--num-layers 2" in capsys.readouterr().err


def test_windows_are_drawn_with_and_without_a_size(capsys: Capture) -> None:
    assert main(["plan", "--kv-pattern", "yoco"]) == 0
    captured = capsys.readouterr()
    assert "window ?" in captured.out
    assert "warning: without --window-size" in captured.err
    assert main(["plan", "--kv-pattern", "yoco", "--window-size", "512"]) == 0
    captured = capsys.readouterr()
    assert "window 512" in captured.out
    assert captured.err == ""


def test_warnings_stay_off_stdout(capsys: Capture) -> None:
    assert main(["plan", "--json", "--kv-pattern", "lasagna-top", "--kv-layers", "11"]) == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "layer 0 reads" in captured.err


@pytest.mark.parametrize(
    "flags",
    ["--kv-pattern sandwich-top --kv-layers 3", "--kv-pattern yoco", "--kv-pattern gemma:8", ""],
)
def test_the_drawing_fits_80_columns(capsys: Capture, flags: str) -> None:
    assert main(["plan", *flags.split()]) == 0
    out = capsys.readouterr().out
    table, _, footer = out.partition("Shape:")
    assert max(map(len, table.splitlines())) <= 80
    assert "--kv-map" in footer


def test_the_drawing_tells_roles_groups_and_passes(capsys: Capture) -> None:
    assert main(["plan", "--kv-map", "0_5_5_5_4_5_6_7", "--kv-recipe", "paper"]) == 0
    out = capsys.readouterr().out
    for text in ("5 of 8 layers", "upward", "of layer 5 ↑", "own, read by 3 more", "layers 1-5"):
        assert text in out
    for text in ("9 (1 without attention)", "9 (8 only K and V)", "7 sweeps without gradient"):
        assert text in out


def test_the_default_is_two_sweeps_over_subsets(capsys: Capture) -> None:
    assert main(["plan", "--kv-map", "0_5_5_5_4_5_6_7"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Recipe two-sweep: strided(4; 1, 1)p." in out
    assert "1 sweep without gradient, then 1 with" in out
    assert "a sweep visits the tokens in 4 interleaved subsets" in out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--kv-pattern sandwich-top", ["--kv-layers", "1 to 22"]),
        ("--kv-patern yoco", ["--kv-pattern"]),
        ("--kv-pattern sandwch-top --kv-layers 3", ["did you mean sandwich-top"]),
        ("--kv-map 0_2_1", ["layer 1", "layer 2"]),
        ("--kv-backward-sweeps 0", ["--kv-backward-sweeps"]),
        ("--num-query-groups 5 --kv-pattern nope", ["2 faults", "--num-query-groups", "nope"]),
    ],
)
def test_errors_are_plain(capsys: Capture, flags: str, expected: list[str]) -> None:
    assert main(["plan", *flags.split()]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for text in expected:
        assert text in captured.err


def test_help_lists_patterns_and_flags(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--help"])
    assert caught.value.code in (0, None)
    out = capsys.readouterr().out
    for text in ("sandwich-*", "*-middle-1/4", "cla:G", "--kv-pattern", "--num-layers", "--json"):
        assert text in out


def test_deepspeed_is_planned_where_it_is_asked_for(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--kv-pattern", "sandwich-top", "--kv-layers", "11"]
    assert main(["plan", *flags]) == 0
    plain = capsys.readouterr().out
    Path("ds.json").write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}')
    engine = ["--deepspeed", "--deepspeed_config", "ds.json", "--data-parallel-size", "8"]
    assert main(["plan", *flags, *engine]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(plain), "what was printed before is printed as before"
    more = shown.removeprefix(plain)
    assert "8 data-parallel replicas" in more and "deepspeed, ZeRO 3 *" in more
    assert "gathers a layer of 5 to 16 up to 9 times forward and 5 backward" in more


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--deepspeed --deepspeed-config missing.json", "cannot be read"),
        ("--zero-stage 2", "add --deepspeed"),
        ("--deepspeed --pipeline-model-parallel-size 2", "do not combine with pipeline stages"),
    ],
)
def test_what_deepspeed_cannot_do_is_told_by_the_plan(
    capsys: Capture, flags: str, part: str
) -> None:
    assert main(["plan", *flags.split()]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert part in told and "Traceback" not in told
