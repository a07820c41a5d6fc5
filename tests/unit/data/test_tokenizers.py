"""Tokenizers load from local files, lose nothing, and refuse what they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.errors import DataError

from .conftest import UNICODE, WORDS


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator([WORDS], vocab_size=300, special_tokens=["<|endoftext|>", "<end>"])
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    fast.save(str(path))
    return path


def test_sentencepiece_keeps_any_text(tokenizer_model: str) -> None:
    tokenizer = load_tokenizer("SentencePieceTokenizer", tokenizer_model)
    assert (tokenizer.vocab_size, tokenizer.eod) == (400, 2)
    text = WORDS + UNICODE
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids and max(ids) < 400
    assert not {1, 2} & set(ids)


def test_hugging_face_file_and_folder(tokenizer_json: Path) -> None:
    vocabulary = json.loads(tokenizer_json.read_text("utf-8"))["model"]["vocab"]
    for place in (tokenizer_json, tokenizer_json.parent):
        tokenizer = load_tokenizer("HuggingFaceTokenizer", str(place))
        assert tokenizer.vocab_size == len(vocabulary)
        assert tokenizer.eod == 0
        assert tokenizer.decode(tokenizer.encode(WORDS + UNICODE)) == WORDS + UNICODE


def test_hugging_face_config_names_the_end_token(tokenizer_json: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    config = {"eos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer("HuggingFaceTokenizer", str(tmp_path)).eod == 1


def test_null_tokenizer_reads_numbers() -> None:
    tokenizer = load_tokenizer("NullTokenizer", None, 50)
    assert tokenizer.encode("0 7  49\n") == [0, 7, 49]
    assert (tokenizer.vocab_size, tokenizer.eod) == (50, 49)
    for text in ("50", "-1", "word"):
        with pytest.raises(DataError):
            tokenizer.encode(text)


def test_wrong_files_are_refused(
    tokenizer_model: str, tokenizer_json: Path, tmp_path: Path
) -> None:
    cases = [
        ("SentencePieceTokenizer", str(tokenizer_json), "not a SentencePiece model"),
        ("SentencePieceTokenizer", str(tmp_path), "not a SentencePiece model"),
        ("HuggingFaceTokenizer", tokenizer_model, "not a Hugging Face tokenizer"),
        ("HuggingFaceTokenizer", str(tmp_path), "transformers cannot read it"),
        ("HuggingFaceTokenizer", "gpt2", "no such file or folder"),
        ("SentencePieceTokenizer", None, "needs a file"),
        ("NullTokenizer", None, "needs the number of ids"),
        ("TikTokenizer", tokenizer_model, "unknown kind"),
    ]
    for kind, model, message in cases:
        with pytest.raises(DataError, match=message):
            load_tokenizer(kind, model)
