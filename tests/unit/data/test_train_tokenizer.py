"""Training a tokenizer drops nothing and gives the same model every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.cli.main import main
from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.data.train_tokenizer import TokenizerJob, cut_sentences, train_tokenizer
from megatron_kvshare.errors import DataError

from .conftest import WORDS


@given(st.text(alphabet="aé日🙂 .!\n", max_size=200), st.integers(4, 40))
def test_cutting_keeps_every_character_and_the_limit(text: str, limit: int) -> None:
    pieces = list(cut_sentences(text, limit))
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)
    assert "".join(pieces).replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_cuts_prefer_sentence_ends_then_spaces() -> None:
    assert list(cut_sentences("One two. Three four", 12)) == ["One two.", "Three four"]
    assert list(cut_sentences("aaaa bbbb cccc", 11)) == ["aaaa bbbb", "cccc"]
    assert list(cut_sentences("ééé", 3)) == ["é", "é", "é"]


def test_one_long_line_is_learned_from(tmp_path: Path) -> None:
    """SentencePiece alone would drop it: the words' pieces show that it was read."""
    path = tmp_path / "long.txt"
    path.write_text("zyxwv utsrq " * 4000)
    job = TokenizerJob(inputs=(str(path),), output=str(tmp_path / "t"), vocab_size=288)
    trained = train_tokenizer(job)
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(trained.model))
    assert trained.text_bytes == 48_000
    assert len(tokenizer.encode("zyxwv utsrq")) <= 2
    assert len(trained.vocab.read_text("utf-8").splitlines()) == 288


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text((WORDS + "\n") * 50)
    lines.write_text(json.dumps({"body": (WORDS + "\n") * 50}) + "\n")
    models = []
    for path, folder in ((text, "x"), (text, "longer/name"), (lines, "y")):
        job = TokenizerJob(
            inputs=(str(path),), output=str(tmp_path / folder), vocab_size=320, json_key="body"
        )
        models.append(train_tokenizer(job).model.read_bytes())
    assert models[0] == models[1] == models[2]


@pytest.mark.parametrize(
    "text, vocab_size, message",
    [
        (WORDS, 5000, r"too short for so many tokens.*use --vocab-size [0-9]+ or more text"),
        (WORDS, 100, "use --vocab-size of at least [0-9]+"),
        ("\n \n", 400, "holds no text|too short|SentencePiece refused"),
    ],
)
def test_impossible_vocabularies(tmp_path: Path, text: str, vocab_size: int, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    job = TokenizerJob(inputs=(str(path),), output=str(tmp_path / "t"), vocab_size=vocab_size)
    with pytest.raises(DataError, match=message):
        train_tokenizer(job)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_broken_line_is_named_though_it_passes_through_the_trainer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    job = TokenizerJob(inputs=(str(path),), output=str(tmp_path / "t"), vocab_size=400)
    with pytest.raises(DataError, match=r"a.jsonl:2"):
        train_tokenizer(job)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text(WORDS * 20)
    argv = ["train-tokenizer", "--input", str(path), "--output", str(tmp_path / "d" / "t")]
    assert main([*argv, "--vocab-size", "300"]) == 0
    assert (tmp_path / "d" / "t.model").is_file()
    assert "300 tokens" in capsys.readouterr().out
    assert main([*argv, "--vocab-size", "0"]) == 2
    blocked = ["--output", str(path / "t"), "--vocab-size", "300"]
    assert main(["train-tokenizer", "--input", str(path), *blocked]) == 2
    assert "cannot be written" in capsys.readouterr().err
