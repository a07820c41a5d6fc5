"""TensorBoard and wandb get the same records; a missing package is a plain message."""

from __future__ import annotations

import sys
import time
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


@pytest.fixture
def offline(tmp_path: Path) -> LogConfig:
    pytest.importorskip("wandb")
    return LogConfig(
        wandb_project="test", wandb_mode="offline", wandb_save_dir=str(tmp_path), wandb_exp_name="a"
    )


def offline_files(folder: Path) -> list[bytes]:
    import wandb

    wandb.teardown()  # its process writes on for a moment after a run is closed
    return [path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb")]


def test_wandb_offline_needs_no_network(offline: LogConfig, tmp_path: Path) -> None:
    sink = Wandb(offline, {"lr": 0.1}, {})
    sink.write(TRAIN)
    sink.write(VALID)
    sink.close()
    (content,) = offline_files(tmp_path)
    assert b"train/loss" in content and b"valid/perplexity" in content


def test_a_wandb_run_goes_on_beside_its_files_of_the_same_second(
    offline: LogConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb names folders by the second, and before 0.22.3 it lost what the later part wrote."""
    second = time.time()
    monkeypatch.setattr(time, "time", lambda: second)
    tracking: dict[str, str] = {}
    for step, name in enumerate(["first", "later", "last"], 1):
        before = dict(tracking)
        sink = Wandb(offline, {"lr": 0.1}, tracking)
        sink.write({"step": step, name: 2.5})
        sink.close()
        assert tracking["wandb"] and before in ({}, tracking)
    found = [
        [name for name in (b"train/first", b"train/later", b"train/last") if name in content]
        for content in offline_files(tmp_path)
    ]
    assert sorted(found) == [[b"train/first"], [b"train/last"], [b"train/later"]]


@pytest.mark.parametrize(
    ("environment", "flag", "mode"),
    [
        ("offline", None, "offline"),
        ("disabled", None, "disabled"),
        ("disabled", "offline", "offline"),
        ("offline", "disabled", "disabled"),
    ],
)
def test_the_environment_wins_over_a_default_and_a_flag_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment, flag, mode
) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads the environment once in the life of a process
    monkeypatch.setenv("WANDB_MODE", environment)
    tracking: dict[str, str] = {}
    log = LogConfig(wandb_project="test", wandb_mode=flag, wandb_save_dir=str(tmp_path))
    sink = Wandb(log, {}, tracking)
    sink.write(TRAIN)
    sink.close()
    assert bool(offline_files(tmp_path)) == (mode == "offline")
    assert bool(tracking) == (mode == "offline")  # there is no run to go on with


def test_a_mode_that_wandb_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ConfigError, match=r"(?s)--wandb-project.*offlin"):
        Wandb(LogConfig(wandb_project="test", wandb_save_dir=str(tmp_path)), {}, {})


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    for name in [package, "torch.utils.tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        if package == "wandb":
            Wandb(LogConfig(wandb_project="p"), {}, {})
        TensorBoard("x", 0)
