"""How far logits may be apart: what fp32 rounding explains, and no further."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kvshare.checkpoint.reader import open_checkpoint
from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion import verify
from megatron_kvshare.conversion.export import ExportJob, export
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import write_folder

MAP = build_map(8, "pizza-bottom", 3)
PLAIN, SENSITIVE = 1.0, 50.0


@pytest.fixture
def imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[float], str]:
    """Imports a model whose queries are ``sharpness`` times as long; gives what is said of it.

    Sharp attention magnifies rounding: one key wins, and which one hangs on the last bits.
    """

    def run(sharpness: float) -> str:
        folder = write_folder(tmp_path / "hf", MAP)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                tensors[name] *= sharpness if "q_proj" in name else 1
            save_file(tensors, file, {"format": "pt"})
        main(["convert", "from-hf", "--hf", str(folder), "--save", str(tmp_path / "native")])
        return capsys.readouterr().err

    return run


def others_are_off_by(monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    """The folder's logits come out wrong by this part of the largest, as by faulty code."""
    right = verify._logits

    def wrong(*arguments: object) -> torch.Tensor:
        logits = right(*arguments)  # type: ignore[arg-type]
        logits[0, 0, 0] += part * logits.abs().max()
        return logits

    monkeypatch.setattr(verify, "_logits", wrong)


def test_a_model_that_magnifies_rounding_is_imported(imported: Callable[[float], str]) -> None:
    assert "four times the effect of the embeddings' last bit" in imported(SENSITIVE)


def test_other_models_keep_the_limit(
    imported: Callable[[float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others_are_off_by(monkeypatch, 3e-5)
    assert "fp32 logits may differ by 1e-05" in imported(PLAIN)


def test_no_model_may_be_further_off(
    imported: Callable[[float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others_are_off_by(monkeypatch, 2e-3)
    assert "fp32 logits may differ by" in imported(SENSITIVE)


def test_an_export_that_is_damaged_gets_no_name(
    imported: Callable[[float], str], tmp_path: Path, single: ParallelState
) -> None:
    """Whoever asks for it: one byte turned after the weights are written, before the proof."""
    imported(PLAIN)
    target = tmp_path / "again"

    def damage(written: int, of: int) -> None:
        (file,) = tmp_path.glob("*again*/model.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    stored = open_checkpoint(tmp_path / "native")
    with pytest.raises(CheckpointError, match="1 tensors are not those of the checkpoint"):
        export(stored, ExportJob(save=target, without_tokenizer=True), single, damage)
    assert not target.exists() and not [*tmp_path.glob("*again*/*")]
