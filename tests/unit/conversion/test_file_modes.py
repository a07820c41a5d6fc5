"""What the commands write has the mode that the umask gives to new files, whatever wrote it and
whatever it was copied from: a team reads what one of them has made."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion import export
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import TINY, write_folder

TOP = build_map(8, "sandwich-top", 3)


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes_below(folder: Path) -> dict[str, int]:
    found = [folder, *folder.rglob("*")]
    return {str(path): stat.S_IMODE(path.stat().st_mode) for path in found}


def test_files_and_folders_follow_the_umask(umask, single, tmp_path, monkeypatch):
    code, made = tmp_path / "package", tmp_path / "made"
    code.mkdir()
    made.mkdir()
    for name in export.CODE:
        shutil.copyfile(export.HERE / name, code / name)
        (code / name).chmod(0o500)
    monkeypatch.setattr(export, "HERE", code)
    (tmp_path / "text.txt").write_text("shared keys and values make a small cache\n" * 50)
    hf = write_folder(tmp_path / "hf", TOP, tiny=TINY.but(vocabulary=288))
    text, tokenizer = str(tmp_path / "text.txt"), str(made / "tok.model")
    learn = ["train-tokenizer", "--input", text, "--output", str(made / "tok")]
    assert main([*learn, "--vocab-size", "288"]) == 0
    own = tmp_path / "own.model"
    shutil.copyfile(tokenizer, own)
    own.chmod(0o400)
    cut = ["preprocess", "--input", text, "--output-prefix", str(made / "data" / "text")]
    assert main([*cut, "--tokenizer-model", tokenizer]) == 0
    native, again = str(made / "native"), str(made / "again")
    assert main(["convert", "from-hf", "--hf", str(hf), "--save", native]) == 0
    back = ["convert", "to-hf", "--load", native, "--save", again, "--max-shard-gb", "0.00004"]
    assert main([*back, "--tokenizer-model", str(own)]) == 0
    found = modes_below(made)
    endings = (".bin", ".idx", ".distcp", ".safetensors", ".model", ".py", ".json", ".md", ".vocab")
    assert all(any(path.endswith(end) for path in found) for end in endings)
    wrong = {
        path: oct(mode)
        for path, mode in found.items()
        if mode != (0o777 if Path(path).is_dir() else 0o666) & ~umask
    }
    assert not wrong
