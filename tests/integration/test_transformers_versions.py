"""Exports do the same on every transformers they are made for: logits, generation in every way,
refusals, gradients. The newest version runs in tests/parity too; here are the others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import write_folder
from tests.integration import side_packages

HERE = Path(__file__).parent
OLDER = {
    "4.57.6": ("huggingface-hub<1.0,>=0.34.0", "tokenizers<=0.23.0,>=0.22.0"),
    "5.0.0": ("huggingface-hub<2.0,>=1.3.0", "tokenizers<=0.23.0,>=0.22.0", "typer-slim"),
    "5.19.0": (),
}
MODELS = {
    "top-paper": (build_map(8, "sandwich-top", 3), "paper"),
    "top-two-sweep": (build_map(8, "sandwich-top", 3), "two-sweep"),
    "lasagna-one-sweep": (build_map(8, "lasagna-middle", 3), "one-sweep"),
    "bottom": (build_map(8, "pizza-bottom", 3), "paper"),
    "windows": (build_map(8, "yoco"), "paper"),
    "standard": (build_map(8, "standard"), "paper"),
}
NUMBERS = ("logits", "hidden", "packed", "second alone", "tuple", "yarn", "scores")


def used(packages: Path, folder: Path) -> dict:
    return json.loads(side_packages.run(packages, HERE / "use_export.py", folder).splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (sharing, recipe) in MODELS.items():
        write_folder(root / name, sharing, RECIPES[recipe])
    return root


@cache
def with_the_newest(folder: Path) -> dict:
    return used(folder.parent / "nothing", folder)


@pytest.mark.nightly
@pytest.mark.download
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("version", OLDER)
def test_an_export_does_the_same(version, name, models):
    packages = side_packages.install(
        f"transformers-{version}", f"transformers=={version}", *OLDER[version]
    )
    wanted, got = with_the_newest(models / name), used(packages, models / name)
    assert got.pop("version") == version
    assert wanted["alone"][0] == [row[3:] for row in wanted["greedy"]][1]
    assert got["packed"] == pytest.approx(got["second alone"], abs=2e-4)
    for kind in got:
        if kind in NUMBERS:
            assert got[kind] == pytest.approx(wanted[kind], abs=2e-4), kind
        elif kind in ("states", "weights"):  # of each layer
            for ours, theirs in zip(got[kind], wanted[kind], strict=True):
                assert ours == pytest.approx(theirs, abs=2e-4), kind
        elif kind == "gradients":
            assert got[kind] == pytest.approx(wanted[kind], rel=1e-3, abs=2e-4)
        else:
            assert got[kind] == wanted[kind], kind
    assert got.get("refused", True)
    assert "static" in got or "refused" in got
