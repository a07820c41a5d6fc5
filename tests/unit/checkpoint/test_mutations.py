"""Damaged manifests and trackers: what is accepted says what was written, all else is an error."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_kvshare.checkpoint import folder
from megatron_kvshare.checkpoint.load import newest_sound
from megatron_kvshare.checkpoint.manifest import (
    Alarm,
    Health,
    Manifest,
    NewerFormat,
    Progress,
    read_manifest,
)
from megatron_kvshare.config import CheckpointConfig, ModelConfig
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from megatron_kvshare.spec.model_spec import ModelSpec
from tests.mutations import mutations, text_mutations

COUNTS = [100, pytest.param(2000, marks=pytest.mark.nightly)]
HEALTH = Health(2, (3.5, 3.25), (0.5, 1.5), (9.0,), True, (Alarm("rising loss", 3, "seen"),))


def manifest(step: int) -> Manifest:
    """One with all that a manifest can hold, with characters that are not ASCII."""
    shared = build_map(3, kv_map="0_2_2")
    spec = ModelSpec(
        model=ModelConfig(num_layers=3),
        map=shared,
        recipe=RECIPES["two-sweep"],
        vocab_size=100,
        tokenizer="abc",
    )
    return Manifest(
        spec.identity,
        Progress(step, 8 * step, 80 * step, 1, HEALTH),
        1,
        2,
        True,
        config={"lr": 1e-3, "save": "Übung", "data_path": ["a", "b"], "load": None},
        versions={"torch": "2.8.0"},
        data={"seed": 1, "train": [{"source": "a", "fingerprint": "f", "weight": 1.0}]},
        tracking={"wandb": "x7"},
        files={},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (20, 40, 60):
        target = folder.iteration_folder(tmp_path, step)
        aside = folder.begin(target)
        manifest(step).write(aside)
        folder.publish(aside, target, step)
    return tmp_path


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", [mutations, text_mutations])
def test_manifest(root: Path, kind, count: int) -> None:
    at = folder.iteration_folder(root, 60)
    path, wanted = at / "kvshare.json", asdict(read_manifest(at))
    text = path.read_text(encoding="utf-8")
    original = text.encode() if kind is mutations else text
    refused = 0
    for what, changed in kind(original, count, seed=count):
        path.write_bytes(changed if isinstance(changed, bytes) else encoded(changed))
        try:
            assert asdict(read_manifest(at)) == wanted, what
        except CheckpointError as error:
            assert not isinstance(error, NewerFormat), what
            refused += 1
    assert refused > count / 2


def encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


@pytest.mark.parametrize("count", COUNTS)
def test_tracker(root: Path, single, count: int) -> None:
    """Another checkpoint than the newest is taken with a warning only: people do want that."""
    settings = CheckpointConfig(load=str(root))
    for what, changed in mutations(b"60\n", count, seed=count):
        (root / folder.TRACKER).write_bytes(changed)
        found = newest_sound(settings, single)
        assert found.iteration == 60 or (found.iteration in (20, 40) and found.warnings), what
    (root / folder.TRACKER).write_text("40\n")
    assert "iter_0000060, which is newer, is left out" in newest_sound(settings, single).warnings[0]
    assert folder.passed_over(root, 40) and folder.passed_over(root, 60) is None
