"""Commands that write in one go own what they write; who comes second leaves it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion.export import written_aside
from megatron_kvshare.errors import EXIT_USER_ERROR, CheckpointError, OwnershipError
from megatron_kvshare.ownership.aside import aside, remove_leftovers
from megatron_kvshare.ownership.owner import file_place, take

BEAT = 0.05


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Makes this process the owner of an output, as another command would be."""
    owned = []
    yield lambda name: owned.append(take(file_place("--output", str(tmp_path / name)), BEAT))
    for each in owned:
        each.check()
        each.release()


def test_preprocess(
    tmp_path: Path, held: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "1 2 3", "title": "4"}\n')
    words = ["preprocess", "--input", str(source), "--output-prefix", str(tmp_path / "out")]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10", "--json-keys"]
    held("out_text_document")
    assert main([*words, "title", "text"]) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "--output-prefix = " in message and "out_text_document" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out_text_document.lock.1",
    ]
    assert main([*words, "title"]) == 0, "files of its own"


def test_train_tokenizer(
    tmp_path: Path, held: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("some words to make tokens of\n" * 20)
    words = ["train-tokenizer", "--input", str(source), "--vocab-size", "280", "--output"]
    held("tok")
    assert main([*words, str(tmp_path / "tok")]) == EXIT_USER_ERROR
    assert "ownership error: --output = " in capsys.readouterr().err
    assert not list(tmp_path.glob("tok.model*"))
    assert main([*words, str(tmp_path / "other")]) == 0
    assert sorted(path.name for path in tmp_path.glob("other*")) == ["other.model", "other.vocab"]


def test_convert(tmp_path: Path, held: Callable[[str], None]) -> None:
    held("hf")
    with pytest.raises(OwnershipError, match="--save"), written_aside(tmp_path / "hf"):
        pytest.fail("two conversions write to one folder")
    with written_aside(tmp_path / "new" / "hf") as partial:
        (partial / "weights").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]
    with pytest.raises(CheckpointError, match="something already"):
        written_aside(tmp_path / "new" / "hf").__enter__()


def test_leftovers_are_those_of_this_name_alone(tmp_path: Path) -> None:
    """`hf.v2` may be another's, which is being written."""
    mine, other = aside(tmp_path / "hf"), aside(tmp_path / "hf.v2")
    old, named = tmp_path / "hf.partial", tmp_path / "hf.mine.partial"
    for path in (mine, other, old, named):
        path.mkdir()
        (path / "weights").touch()
    remove_leftovers(tmp_path, "hf")
    assert sorted(tmp_path.iterdir()) == sorted([other, named])
