"""TensorBoard and wandb get the same records; a missing package is a plain message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_kvshare.config import LogConfig
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.train.sinks import TensorBoard, Wandb

TRAIN = {"step": 1, "loss": 2.5, "skipped": True}
VALID = {"step": 1, "valid_loss": 2.0, "valid_perplexity": 7.4}


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(str(tmp_path))
    sink.write(TRAIN)
    sink.write(VALID)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("train/loss")[0].value == 2.5
    assert events.Scalars("valid/perplexity")[0].value == pytest.approx(7.4)


def test_wandb_offline_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    settings = LogConfig(
        wandb_project="test", wandb_mode="offline", wandb_save_dir=str(tmp_path), wandb_exp_name="a"
    )
    sink = Wandb(settings, {"lr": 0.1})
    sink.write(TRAIN)
    sink.write(VALID)
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    for name in [package, "torch.utils.tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        Wandb(LogConfig(wandb_project="p"), {}) if package == "wandb" else TensorBoard("x")
