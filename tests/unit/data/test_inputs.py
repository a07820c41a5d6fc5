"""Finding input and reading it: forms, compressions, places, and what is no document."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from megatron_kvshare.data import columns, cutting
from megatron_kvshare.data.documents import BadRecord, Position, Reason, Record, records
from megatron_kvshare.data.inputs import InputOptions, Inputs, open_inputs
from megatron_kvshare.errors import DataError
from tests.mutations import mutations

from .conftest import UNICODE, WORDS
from .test_archives import zstd

TEXTS = [
    WORDS,
    UNICODE * 3,
    "한국어 日本語 ﷽ 🙂🏽",
    "x",
    'tab\tand \\ and " and \u2028 line',
    WORDS * 40,
]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def as_parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file, 2)
    return file.getvalue()


def as_arrow(texts: list[str], open_writer: Callable = ipc.new_file) -> bytes:
    file = io.BytesIO()
    table = pyarrow.table({"text": texts})
    with open_writer(file, table.schema) as writer:
        writer.write_table(table, 2)
    return file.getvalue()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}
FORMS = {
    **{
        f"a.jsonl{end}": (lambda t, pack=pack: pack(json_lines(t)))
        for end, pack in COMPRESSIONS.items()
    },
    "utf16.jsonl": lambda t: json_lines(t).decode().encode("utf-16"),
    "big-endian.jsonl.gz": lambda t: gzip.compress(json_lines(t).decode().encode("utf-16-be")),
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "stream.arrow": lambda t: as_arrow(t, ipc.new_stream),
}


def read(*paths: object, **options: object) -> list[Record]:
    return list(open_inputs([str(p) for p in paths], InputOptions(**options)).records())


def texts(found: list[Record]) -> list[str]:
    return [record.texts[0] for record in found if not isinstance(record, BadRecord)]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name](TEXTS))
    found = read(tmp_path / name)
    assert texts(found) == TEXTS
    assert [record.number for record in found] == list(range(1, len(TEXTS) + 1))


def pieces_from(inputs: Inputs, start: Position) -> list[tuple]:
    found = []
    for piece in inputs.pieces(start):
        keys, limit = inputs.options.json_keys, inputs.options.max_document_bytes
        found += [record for record in records(piece, keys, limit)]
    return found


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
@pytest.mark.parametrize("name", [*FORMS, "a.txt", "a.txt.zst"])
def test_reading_goes_on_from_the_end_of_every_piece(
    tmp_path: Path, name: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "READ_BYTES", 64)
    monkeypatch.setattr(columns, "_BATCH_BYTES", 64)
    plain = "\n\n".join(TEXTS).encode()
    content = (
        FORMS[name](TEXTS)
        if name in FORMS
        else COMPRESSIONS[Path(name).suffix.replace(".txt", "")](plain)
    )
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_bytes(plain)
    words = [str(tmp_path / name), str(tmp_path / "b.txt")]
    options = InputOptions(text_documents=unit, max_document_bytes=700)
    whole = open_inputs(words, options)
    pieces = list(whole.pieces())
    assert len(pieces) >= 2
    every = [r for p in pieces for r in records(p, ("text",), options.max_document_bytes)]
    after = 0
    for piece in pieces:
        after += len(list(records(piece, ("text",), options.max_document_bytes)))
        assert pieces_from(open_inputs(words, options), piece.end) == every[after:]
    assert any(isinstance(r, BadRecord) and r.reason == Reason.TOO_LONG for r in every)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1)
)
def test_random_documents_come_through(tmp_path: Path, found: list[str]) -> None:
    for name in ("a.jsonl.zst", "a.parquet", "stream.arrow"):
        (tmp_path / name).write_bytes(FORMS[name](found))
        assert texts(read(tmp_path / name)) == found


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from("ab \n\r\t"), max_size=200), st.integers(1, 40))
def test_pieces_never_cut_a_document(content: str, size: int) -> None:
    """However the bytes arrive, paragraphs and lines are those of the whole text."""
    stream = io.BytesIO(content.encode())
    for unit, expected in (
        ("line", [line for line in content.split("\n") if line.strip()]),
        ("paragraph", _paragraphs(content)),
    ):
        stream.seek(0)
        got = []
        for cut in cutting.cuts(lambda _: stream.read(size), unit, 10_000):
            assert cut.content is not None
            text = cut.content.decode()
            got += text.split("\n") if unit == "line" else _paragraphs(text)
        assert [line for line in got if line.strip()] == expected


def _paragraphs(text: str) -> list[str]:
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("part-00000", json_lines(TEXTS), "JSON lines"),
        ("x.txt", json_lines(TEXTS), "JSON lines"),
        ("x.txt", b"\xef\xbb\xbf\n" + json_lines(TEXTS), "JSON lines"),
        ("x.jsonl", gzip.compress(json_lines(TEXTS)), "JSON lines, gzip"),
        ("x.jsonl.gz", json_lines(TEXTS), "JSON lines"),
        ("x.jsonl.gz", zstd(json_lines(TEXTS)), "JSON lines, Zstandard"),
        ("x.jsonl.gz", gzip.compress(gzip.compress(json_lines(TEXTS))), "JSON lines, gzip, gzip"),
        ("x", bz2.compress(json_lines([WORDS * 20_000])), "JSON lines, bzip2"),
        ("x.jsonl", as_parquet(TEXTS), "Parquet"),
        ("x.bin", as_arrow(TEXTS, ipc.new_stream), "Arrow"),
        ("x.txt", "hello wide world".encode("utf-16-le"), "plain text in UTF-16-LE"),
        ("x.txt", "hello wide world".encode("utf-16-be"), "plain text in UTF-16-BE"),
        ("x.jsonl", b"no JSON at all\nnowhere\n", "plain text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_content_decides_and_names_that_disagree_are_told(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    (tmp_path / name).write_bytes(content)
    inputs = open_inputs([str(tmp_path / name)])
    assert inputs.kinds() == {kind: 1}
    assert len(inputs.warnings) == 1 and f"by content {kind}" in inputs.warnings[0]
    found = list(inputs.documents())
    assert found[0].texts[0].split()[0] in ("shared", "hello", "no")


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b/10.txt",
        "a.txt",
        ".hidden.txt",
        "_SUCCESS",
        "b/README.md",
        ".git/x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    inputs = open_inputs([str(tmp_path)])
    assert [document.texts[0] for document in inputs.documents()] == [
        "a.txt",
        "b/10.txt",
        "b/2.txt",
    ]
    assert inputs.warnings == [f"{tmp_path}/empty.txt: empty, left out"]
    inputs = open_inputs([f"{tmp_path}/**/*.txt", str(tmp_path / "a.txt")])
    assert [d.texts[0] for d in inputs.documents()] == ["a.txt", "b/10.txt", "b/2.txt", "a.txt"]
    assert any("a.txt: given twice" in warning for warning in inputs.warnings)


def test_pipes_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(gzip.compress(json_lines(TEXTS))))
    writer.start()
    assert texts(read(fifo)) == TEXTS
    writer.join()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json_lines(TEXTS))))
    assert texts(read("-")) == TEXTS


def test_data_sets_on_the_disk(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"content": TEXTS, "n": list(range(len(TEXTS)))})
    made.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert texts(read(tmp_path / "one", json_keys=("content",))) == TEXTS
    assert texts(read(tmp_path / "two", json_keys=("content",))) == TEXTS
    assert texts(read(tmp_path / "two", json_keys=("content",), dataset_split="test")) == TEXTS[:1]
    inputs = open_inputs([str(tmp_path / "one")], InputOptions(json_keys=("content",)))
    assert texts(pieces_from(inputs, Position(0, 4, 5))) == TEXTS[4:]
    with pytest.raises(DataError, match="has the splits train, test"):
        read(tmp_path / "two", dataset_split="valid")
    for key, rule in (("text", "no such column"), ("n", "holds int64, not text")):
        with pytest.raises(DataError, match=rule):
            read(tmp_path / "one", json_keys=(key,))


def test_a_data_set_of_the_hub_is_streamed_from_a_row_on(tmp_path: Path) -> None:
    """The library streams a folder in the hub's layout as it does the hub itself."""
    for number, some in enumerate((TEXTS[:2], TEXTS[2:])):
        (tmp_path / f"train-0000{number}-of-00002.parquet").write_bytes(as_parquet(some))
    dataset = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    for start in range(len(TEXTS)):
        rows = list(columns.dataset_rows(dataset, "x", ("text",), start))
        assert [v.decode() for _, values in rows for v in values[0]] == TEXTS[start:]
        assert rows[0][0] == start


def test_a_name_of_the_hub_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no such file or folder.*offline") as caught:
        open_inputs(["someone/something", "hf://datasets/someone/else", "folder/missing.jsonl"])
    assert len(caught.value.faults) == 3
    assert caught.value.faults[2].rule == "there is no such file"


BAD = {
    Reason.NOT_JSON: b'{"text": "cut',
    Reason.NOT_OBJECT: b'["text"]',
    Reason.MISSING: b'{"txt": "a"}',
    Reason.NULL: b'{"text": null}',
    Reason.NOT_TEXT: b'{"text": ["a", "b"]}',
    Reason.NOT_UTF8: b'{"text": "\xff\xfe"}',
    Reason.SURROGATE: b'{"text": "a \\udc00 b"}',
    Reason.NUL: b'{"text": "a\\u0000b"}',
    Reason.TOO_LONG: json.dumps({"text": "long " * 1_000}).encode(),
}


@pytest.mark.parametrize("read_bytes", [50, 1 << 18])
def test_every_bad_record_has_its_reason_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(cutting, "READ_BYTES", read_bytes)
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(b"\n" + b"".join(good + line + b"\n" for line in BAD.values()) + good)
    found = read(path, max_document_bytes=1_000)
    assert texts(found) == ["good"] * (len(BAD) + 1)
    bad = [record for record in found if isinstance(record, BadRecord)]
    assert [record.reason for record in bad] == list(BAD)
    assert [record.number for record in bad] == [3 + 2 * i for i in range(len(BAD))]
    assert "--on-bad-record skip" in str(bad[0].error(skippable=True))


def test_numbers_beyond_pythons_limit_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "n": %s}\n' % ("9" * 5_000))
    assert texts(read(path)) == ["fine"]


def test_rows_that_are_null_or_no_utf8(tmp_path: Path) -> None:
    values = pyarrow.array([b"a", None, b"\xff", b"b"], pyarrow.binary()).cast(
        pyarrow.string(), safe=False
    )
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert texts(found) == ["a", "b"]
    assert [(r.reason, r.number) for r in found if isinstance(r, BadRecord)] == [
        (Reason.NULL, 2),
        (Reason.NOT_UTF8, 3),
    ]


@pytest.mark.parametrize("end", [".gz", ".xz", ".bz2", ".zst"])
def test_a_cut_archive_gives_what_comes_before(tmp_path: Path, end: str) -> None:
    lines = [f"line {number} " + WORDS for number in range(4_000)]
    whole = COMPRESSIONS[end](json_lines(lines))
    (tmp_path / f"a.jsonl{end}").write_bytes(whole[: len(whole) - 40])
    (tmp_path / "b.jsonl").write_bytes(json_lines(["after"]))
    found = read(tmp_path / f"a.jsonl{end}", tmp_path / "b.jsonl")
    bad = [record for record in found if isinstance(record, BadRecord)]
    assert [record.reason for record in bad] == [Reason.DAMAGED]
    got = texts(found)
    assert got[-1] == "after" and got[:-1] == lines[: len(got) - 1]
    assert bad[0].number in (0, len(got))


@pytest.mark.parametrize("end", [".gz", ".xz", ".bz2", ".zst"])
def test_a_decompression_bomb_ends_in_a_message(tmp_path: Path, end: str) -> None:
    (tmp_path / f"a.jsonl{end}").write_bytes(
        COMPRESSIONS[end](b'{"text": "a"}\n' + b"0" * 6_000_000)
    )
    found = read(tmp_path / f"a.jsonl{end}", max_document_bytes=1_000_000)
    assert texts(found) == ["a"]
    assert any(isinstance(r, BadRecord) and "bomb" in r.rule for r in found)


def check_mutations(folder: Path, count: int, seed: int) -> None:
    """Whatever the damage: documents, bad records or a message."""
    for name, made in FORMS.items():
        for _, content in mutations(made(TEXTS), count, seed):
            (folder / name).write_bytes(content)
            with contextlib.suppress(DataError):
                assert len(read(folder / name)) < 10_000


def test_damaged_files_end_in_records_or_a_message(tmp_path: Path) -> None:
    check_mutations(tmp_path, 15, seed=7)


@pytest.mark.nightly
def test_much_damaged_files_end_in_records_or_a_message(tmp_path: Path) -> None:
    check_mutations(tmp_path, 300, seed=8)


def test_a_table_is_no_longer_than_its_buffers(tmp_path: Path) -> None:
    """Arrow believes a damaged batch that claims a billion rows, and reads behind its end."""
    content = as_arrow(["one", "two", "three"], ipc.new_stream)
    length = (2).to_bytes(8, "little")
    assert content.count(length) >= 1
    found = []
    for place in range(len(content) - 8):
        if content[place : place + 8] == length:
            path = tmp_path / "a.arrow"
            path.write_bytes(
                content[:place] + (1 << 30).to_bytes(8, "little") + content[place + 8 :]
            )
            found += [r for r in read(path) if isinstance(r, BadRecord)]
    assert any("offsets" in bad.rule or "length" in bad.rule for bad in found)
