"""Compressed files are read to their last byte, or refused with the place that is wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import xxhash

from megatron_kvshare.data.inputs import InputOptions, open_inputs
from megatron_kvshare.errors import DataError
from tests.mutations import mutations

TEXTS = [f"document {number} " + "of some length " * (number % 7) for number in range(60)]
PARTS = [
    "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[first : first + 20]).encode()
    for first in (0, 20, 40)
]


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def zstd(content: bytes) -> bytes:
    """A frame with a checksum, as the program ``zstd`` writes it."""
    frame = bytearray(pyarrow.Codec("zstd").compress(content, asbytes=True))
    frame[4] |= 4
    return bytes(frame) + xxhash.xxh64_digest(content)[:3:-1]


FORMS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.compress,
    ".gz": gzipped,
    ".bz2": bz2.compress,
    ".zst": zstd,
}
forms = pytest.mark.parametrize("suffix", FORMS)


def read(path: Path) -> list[str]:
    return [document.texts[0] for document in open_inputs([str(path)]).documents()]


def written(folder: Path, suffix: str, *streams: bytes) -> Path:
    path = folder / f"a.jsonl{suffix}"
    path.unlink(missing_ok=True)
    path.write_bytes(b"".join(streams))
    return path


@forms
@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_streams_are_read(tmp_path: Path, suffix: str, number: int) -> None:
    streams = [FORMS[suffix](part) for part in PARTS[:number]]
    assert read(written(tmp_path, suffix, *streams)) == TEXTS[: 20 * number]
    empty = FORMS[suffix](b"")
    assert read(written(tmp_path, suffix, empty, *streams, empty)) == TEXTS[: 20 * number]


@forms
def test_streams_larger_than_every_buffer(tmp_path: Path, suffix: str) -> None:
    """Compressed beyond one read, and zeros that grow a thousandfold."""
    texts = ["".join(chr(32 + (i * i * 7919 + j) % 90) for i in range(90_000)) for j in range(3)]
    texts.append("0" * 3_000_000)
    streams = [FORMS[suffix](json.dumps({"text": text}).encode() + b"\n") for text in texts]
    assert read(written(tmp_path, suffix, *streams)) == texts


@forms
@pytest.mark.parametrize("damage", ["flipped", "cut", "garbage", "first byte", "other format"])
def test_a_damaged_second_stream_is_an_error_with_its_place(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    first, second = (FORMS[suffix](part) for part in PARTS[:2])
    middle = len(second) // 2
    flipped = second[:middle] + bytes([second[middle] ^ 16]) + second[middle + 1 :]
    if suffix == ".zst":
        place = r"damaged or cut off behind \d+ bytes of its content"
        second = {
            "flipped": flipped,
            "cut": second[:middle],
            "garbage": b"garbage",
            "first byte": b"\1" + second[1:],
            "other format": gzipped(PARTS[1]),
        }[damage]
        with pytest.raises(DataError, match=place):
            read(written(tmp_path, suffix, first, second))
        return
    second, place = {
        "flipped": (flipped, f"stream 2, which begins at byte {len(first)} is damaged"),
        "cut": (second[:middle], f"ends inside stream 2, which begins at byte {len(first)}"),
        "garbage": (b"garbage", f"what begins at byte {len(first)} is not"),
        "first byte": (b"\1" + second[1:], f"what begins at byte {len(first)} is not"),
        "other format": (b"(\xb5/\xfd" + second, f"what begins at byte {len(first)} is not"),
    }[damage]
    with pytest.raises(DataError, match=place):
        read(written(tmp_path, suffix, first, second))


@pytest.mark.parametrize(
    ("suffix", "zeros", "fault"),
    [
        (".xz", 4, None),
        (".xz", 400_000, None),
        (".xz", 3, "3 zero bytes"),
        (".gz", 1, None),
        (".gz", 511, None),
        (".bz2", 4, "is not bzip2 data"),
    ],
)
def test_padding_is_what_the_format_allows(
    tmp_path: Path, suffix: str, zeros: int, fault: str | None
) -> None:
    first, second = (FORMS[suffix](part) for part in PARTS[:2])
    for streams in ((first, bytes(zeros), second), (first, second, bytes(zeros))):
        path = written(tmp_path, suffix, *streams)
        if fault is None:
            assert read(path) == TEXTS[:40]
            continue
        with pytest.raises(DataError, match=fault):
            read(path)


@forms
def test_zeros_alone_are_no_archive(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="zero bytes"):
        read(written(tmp_path, suffix, bytes(64)))


def check_mutations(folder: Path, suffix: str, count: int, seed: int) -> None:
    """Damage is refused, or changes no text; a file cut between two streams, or zero from there on,
    is a sound one."""
    streams = [FORMS[suffix](part) for part in PARTS]
    sound = [b"".join(streams[:number]).rstrip(b"\0") for number in (1, 2)]
    for what, content in mutations(b"".join(streams), count, seed):
        path = written(folder, suffix, content)
        try:
            found = read(path)
        except DataError:
            continue
        assert found == TEXTS or content.rstrip(b"\0") in sound, what


@forms
def test_damage_never_goes_unnoticed(tmp_path: Path, suffix: str) -> None:
    check_mutations(tmp_path, suffix, 100, seed=2)


@pytest.mark.nightly
@forms
def test_much_damage_never_goes_unnoticed(tmp_path: Path, suffix: str) -> None:
    check_mutations(tmp_path, suffix, 2_000, seed=3)


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("a.zip", b"PK\3\4rest", "unpack it"),
        ("a.tar", b"name".ljust(257, b"\0") + b"ustar\x0000", "tar -xf"),
        ("a.tar.gz", gzipped(b"name".ljust(257, b"\0") + b"ustar\x0000"), "tar -xf"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18rest", "lz4 -d"),
        ("a.parquet.gz", gzipped(b"PAR1\x15\4\x15"), "decompress it first"),
        ("a.json", b'[\n{"text": "a"},\n{"text": "b"}]', "one object per line"),
        ("a.pdf", b"%PDF-1.7\n", "extract its text"),
        ("out.idx", b"MMIDIDX\0\0\1", "--data-path"),
    ],
)
def test_what_is_not_read_is_refused_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, fix: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=fix):
        open_inputs([str(tmp_path / name)])


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_plain_text_has_no_zero_bytes(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "part-00000"
    path.write_bytes(b"text with a hole" + bytes(20))
    options = InputOptions(text_documents=unit)
    with pytest.raises(DataError, match="zero bytes"):
        list(open_inputs([str(path)], options).documents())


def test_text_about_json_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in ('{"name": 1}\n', "{not JSON}", '{"text": 3}', "BZh is a name"):
        path.write_text(content)
        assert read(path) == [content]
