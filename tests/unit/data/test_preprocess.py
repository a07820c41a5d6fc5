"""Token files made here are read by stock megatron-core, whatever the number of workers."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.data import encoding
from megatron_kvshare.data.preprocess import PreprocessJob, preprocess
from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.errors import DataError
from megatron_kvshare.megatron_api.datasets import IndexedDataset

from .conftest import UNICODE, WORDS

TEXTS = [WORDS, "", UNICODE, WORDS * 300, "   \n", "end"]


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    path = tmp_path / "in.jsonl.xz"
    lines = "".join(json.dumps({"text": text, "title": text[:5]}) + "\n" for text in TEXTS)
    path.write_bytes(lzma.compress(lines.encode()))
    return str(path)


def job_for(source: str, output: Path, model: str, **changes: object) -> PreprocessJob:
    settings: dict[str, object] = {
        "inputs": (source,),
        "output_prefix": str(output),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": model,
    }
    return PreprocessJob(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("append_eod", [False, True])
def test_round_trip(jsonl: str, tmp_path: Path, tokenizer_model: str, append_eod: bool) -> None:
    job = job_for(jsonl, tmp_path / "new" / "out", tokenizer_model, append_eod=append_eod)
    counts = preprocess(job)
    tokenizer = load_tokenizer("SentencePieceTokenizer", tokenizer_model)
    stored = IndexedDataset(str(tmp_path / "new" / "out_text_document"))
    documents = [stored[i].tolist() for i in range(len(stored))]
    end = [2] if append_eod else []
    expected = [tokenizer.encode(text) + end for text in TEXTS if text.strip()]
    assert documents == expected
    assert stored.document_indices.tolist() == list(range(len(expected) + 1))
    assert (counts.documents, counts.skipped) == (4, 2)
    assert counts.tokens == sum(map(len, expected))
    assert counts.bytes_read == counts.total_bytes
    if not append_eod:
        assert [tokenizer.decode(ids) for ids in documents] == [t for t in TEXTS if t.strip()]


def test_files_do_not_depend_on_workers(
    jsonl: str, tmp_path: Path, tokenizer_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_TASK_BYTES", 50)
    for workers in (1, 2):
        preprocess(job_for(jsonl, tmp_path / str(workers), tokenizer_model, workers=workers))
    for suffix in (".bin", ".idx", ".meta.json"):
        one, two = (tmp_path / f"{workers}_text_document{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_each_key_gets_its_own_files(jsonl: str, tmp_path: Path, tokenizer_model: str) -> None:
    job = job_for(jsonl, tmp_path / "out", tokenizer_model, json_keys=("text", "title"))
    preprocess(job)
    stored = [IndexedDataset(prefix) for prefix in job.prefixes]
    sizes = [files.sequence_lengths.sum() for files in stored]
    assert job.prefixes[1].endswith("out_title_document")
    assert sizes[0] > sizes[1] > 0


def test_a_fault_in_a_worker_leaves_old_files_alone(tmp_path: Path, tokenizer_model: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "good"}\n')
    preprocess(job_for(str(path), tmp_path / "out", tokenizer_model))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != path}
    path.write_text('{"text": "good"}\n{"text": "cut\n')
    with pytest.raises(DataError, match=r"in.jsonl:2.*not JSON"):
        preprocess(job_for(str(path), tmp_path / "out", tokenizer_model, workers=2))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != path} == before


def test_nothing_to_write_and_nowhere_to_write(tmp_path: Path, tokenizer_model: str) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(" \n ")
    with pytest.raises(DataError, match="holds no text"):
        preprocess(job_for(str(path), tmp_path / "out", tokenizer_model))
    with pytest.raises(DataError, match="cannot be written"):
        preprocess(job_for(str(path), path / "out", tokenizer_model))
    assert [file.name for file in tmp_path.iterdir()] == ["blank.txt"]


def test_plain_text_has_one_key(tmp_path: Path, tokenizer_model: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    with pytest.raises(DataError, match="is plain text"):
        preprocess(job_for(str(path), tmp_path / "o", tokenizer_model, json_keys=("a", "b")))


@pytest.fixture
def end_folder(tmp_path: Path) -> str:
    """A Hugging Face tokenizer whose end token, ``<end>``, is named in an older settings file."""
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator([WORDS], vocab_size=300, special_tokens=["</s>", "<end>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    return str(folder)


def test_end_tokens_inside_documents_are_told_and_can_be_text(
    tmp_path: Path,
    end_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(encoding, "_TASK_BYTES", 50)
    path = tmp_path / "a.jsonl"
    texts = [WORDS, "one<end>two", WORDS, "three <end><end> four", "</s>"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["preprocess", "--input", str(path), "--append-eod", "--tokenizer-model", end_folder]
    argv += ["--tokenizer-type", "HuggingFaceTokenizer"]
    split = ["--split-special-tokens"]
    for name, flags, inner in (("as_it_is", ["--workers", "2"], 3), ("split", split, 0)):
        prefix = tmp_path / name
        assert main([*argv, "--output-prefix", str(prefix), *flags]) == 0
        said = capsys.readouterr().err
        assert ("2 documents hold the end-of-document token, 3 times" in said) is (inner > 0)
        assert (f"{path}:2" in said and "--split-special-tokens" in said) is (inner > 0)
        stored = IndexedDataset(f"{prefix}_text_document")
        documents = [stored[number].tolist() for number in range(len(stored))]
        assert sum(ids.count(1) for ids in documents) == len(texts) + inner
        assert all(ids[-1] == 1 for ids in documents)
        notes = json.loads(Path(f"{prefix}_text_document.meta.json").read_text())
        assert (notes["eod"], notes["split_special_tokens"]) == (1, not inner)
        if not inner:
            tokenizer = load_tokenizer("HuggingFaceTokenizer", end_folder)
            assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts


def test_command(
    jsonl: str, tmp_path: Path, tokenizer_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["preprocess", "--input", jsonl, "--output-prefix", str(tmp_path / "o")]
    argv += ["--tokenizer-type", "SentencePieceTokenizer", "--workers", "1", "--append-eod"]
    assert main([*argv, "--tokenizer-model", tokenizer_model]) == 0
    assert "4 documents" in capsys.readouterr().out
    notes = json.loads((tmp_path / "o_text_document.meta.json").read_text())
    assert (notes["vocab_size"], notes["eod"], notes["documents"]) == (400, 2, 4)
    assert main(argv) == 2
    assert main(["preprocess", "--output-prefix", "x", "--inputs", jsonl]) == 2
    message = capsys.readouterr().err
    assert "--input" in message and "Traceback" not in message
