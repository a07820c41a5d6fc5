"""Training is what it was: five steps of every map and recipe against golden.json."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parity import golden

CASES = golden.cases()
QUICK = [*CASES][::9]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(golden.FILE.read_text())


def test_every_map_and_recipe_is_there(recorded: dict[str, Any]) -> None:
    assert recorded["cases"].keys() == CASES.keys()
    assert all(len(reason) > 10 for reason in recorded["reasons"])


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in CASES],
)
def test_golden(name: str, recorded: dict[str, Any], single) -> None:
    """By the bit on the machine that wrote the file, elsewhere within rounding."""
    wanted, got = recorded["cases"][name], golden.outcome(CASES[name], single)
    assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert got["gradients"] == pytest.approx(wanted["gradients"], rel=1e-6, abs=1e-9)
    if golden.machine() == recorded["machine"]:
        assert got == wanted
