"""Tokenizers over bytes give what megatron-core's and tiktoken's own classes give."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from megatron.core.tokenizers.text.libraries.bytelevel_tokenizer import ByteLevelTokenizer
from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

from megatron_kvshare.data.tokenizers import Tokenizer, kind_of, load_tokenizer
from megatron_kvshare.errors import DataError

from .conftest import UNICODE, WORDS

TEXTS = [WORDS, UNICODE, "x", "I'll  be\n\n back in 1999, they're 12345!", "ﷺ 🙂🏽"]
PIECES = [b"ab", b"sh", b"ar", b" ar", b"sh" + b"ar", b"in", b"\r\n", b"  ", b"19"]


@pytest.fixture
def megatron_file(tmp_path: Path) -> Path:
    tokens = [bytes([value]) for value in range(256)] + PIECES
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": "?"}
        for rank, token in enumerate(tokens)
    ]
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def tiktoken_file(tmp_path: Path) -> Path:
    tokens = [bytes([value]) for value in reversed(range(256))] + PIECES
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path = tmp_path / "some.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


def batch(tokenizer: Tokenizer) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)]


def test_bytes_are_those_of_megatron() -> None:
    ours, theirs = load_tokenizer("ByteLevelTokenizer", None), ByteLevelTokenizer()
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    assert batch(ours) == [theirs.text_to_ids(text) for text in TEXTS]
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    assert len(ours.spellings()) == 512
    with pytest.raises(DataError, match="256 bytes"):
        load_tokenizer("ByteLevelTokenizer", None, 100)


def test_files_of_megatron(megatron_file: Path) -> None:
    pytest.importorskip("tiktoken")
    size = 1_000 + 256 + len(PIECES)
    ours = load_tokenizer("TikTokenizer", str(megatron_file))
    theirs = TikTokenTokenizer(str(megatron_file), vocab_size=size)
    assert (ours.vocab_size, ours.eod) == (size, theirs.eos_id)
    assert batch(ours) == [theirs.tokenizer.encode(text) for text in TEXTS]
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    assert len(ours.spellings()) == size
    assert ours.encode("</s>") == [2]
    split = load_tokenizer("TikTokenizer", str(megatron_file), split_special_tokens=True)
    assert split.encode("</s>") != [2]
    assert split.decode(split.encode("</s>")) == "</s>"


def test_files_of_tiktoken(tiktoken_file: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext.openai_public import r50k_pat_str

    ours = load_tokenizer(kind_of(str(tiktoken_file)), str(tiktoken_file))
    ranks = tiktoken.load.load_tiktoken_bpe(str(tiktoken_file))
    theirs = tiktoken.Encoding(
        "x", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 265}
    )
    assert (ours.vocab_size, ours.eod) == (266, 265)
    assert batch(ours) == theirs.encode_batch(TEXTS)
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"IQ== 5\n", b"!! 0\n", b"[1]", b"[]", b'[{"rank": 0}]', b"{", b"\xff\xfe 1"],
)
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("tiktoken")
    path = tmp_path / "x.tiktoken"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a file of tiktoken"):
        load_tokenizer("TikTokenizer", str(path))
