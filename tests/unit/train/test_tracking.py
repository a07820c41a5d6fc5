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

    sink = TensorBoard(str(tmp_path), 0)
    sink.write(TRAIN)
    sink.write(VALID)
    sink.write(TRAIN | {"step": 2, "loss": 9.0})
    sink.close()
    sink = TensorBoard(str(tmp_path), 1)  # resumed after step 1
    sink.write(TRAIN | {"step": 2, "loss": 2.0})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [
        (1, 2.5),
        (2, 2.0),
    ]
    assert events.Scalars("valid/perplexity")[0].value == pytest.approx(7.4)


def test_wandb_offline_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    settings = LogConfig(
        wandb_project="test", wandb_mode="offline", wandb_save_dir=str(tmp_path), wandb_exp_name="a"
    )
    tracking: dict[str, str] = {}
    sink = Wandb(settings, {"lr": 0.1}, tracking)
    sink.write(TRAIN)
    sink.write(VALID)
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    again = dict(tracking)
    Wandb(settings, {"lr": 0.1}, again).close()
    assert tracking["wandb"] and again == tracking
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{tracking['wandb']}"))) == 2


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    for name in [package, "torch.utils.tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        if package == "wandb":
            Wandb(LogConfig(wandb_project="p"), {}, {})
        TensorBoard("x", 0)
