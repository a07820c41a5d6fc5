"""Reading documents from files of every supported form."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from megatron_kvshare.data.inputs import InputOptions, open_inputs
from megatron_kvshare.errors import DataError

from .conftest import UNICODE

TEXTS = ["one\ntwo", "", UNICODE, "x" * 10_000]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts(path: Path, **options: str) -> list[str]:
    inputs = open_inputs([str(path)], InputOptions(**options))
    return [document.texts[0] for document in inputs.documents()]


@pytest.mark.parametrize(
    "name, compress",
    [("a.jsonl", bytes), ("a.jsonl.xz", lzma.compress), ("a.json.gz", gzip.compress)],
)
def test_jsonl_keeps_texts_plain_or_compressed(tmp_path: Path, name: str, compress) -> None:
    path = tmp_path / name
    path.write_bytes(compress(JSONL))
    assert texts(path) == TEXTS


@pytest.mark.parametrize(
    "unit, expected",
    [
        ("file", ["a b\nc\n\n \nd\n"]),
        ("paragraph", ["a b\nc", "d"]),
        ("line", ["a b", "c", "d"]),
    ],
)
def test_plain_text_units(tmp_path: Path, unit: str, expected: list[str]) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"\xef\xbb\xbfa b\r\nc\r\n\r\n \r\nd\r\n"))
    assert texts(path, text_documents=unit) == expected


def test_order_follows_the_inputs_and_bytes_are_counted(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / name).write_text(name)
    inputs = open_inputs([str(tmp_path / "b"), str(tmp_path / "a")])
    assert [document.texts for document in inputs.documents()] == [["b"], ["a"]]
    assert inputs.bytes_read == inputs.total_bytes == 2


def test_escaped_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "b\\ud83d\\ude42"}')
    assert texts(path) == ["b🙂"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text": \n', "a.jsonl:2"),
        (b"[1]\n", "not a JSON object"),
        (b'{"content": "a"}\n', "here|this line has: content"),
        (b'{"text": 3}\n', "no text under this key"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
        (b'{"text": null}\n', "it is null"),
        (b'{"text": "a\\ud83d b"}\n', r"half of a surrogate pair \(.ud83d"),
        (b'{"text": "a\\u0000"}\n', "zero bytes"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(path)


@pytest.mark.parametrize("name, whole", [("a.txt.xz", lzma.compress), ("a.txt.gz", gzip.compress)])
def test_a_cut_archive_is_an_error(tmp_path: Path, name: str, whole) -> None:
    path = tmp_path / name
    path.write_bytes(whole(JSONL)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        texts(path)


def test_missing_empty_and_useless_inputs_come_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    paths = [str(tmp_path / name) for name in ("none.txt", "empty.txt", "folder", "*.gz")]
    with pytest.raises(DataError) as caught:
        open_inputs(paths)
    assert len(caught.value.faults) == 4
